#pragma once

namespace pc3d {

// Number of OpenMP threads a kernel may use now: the count set from Python (torch.get_num_threads()), and 1 in a process
// forked after the extension was loaded (a DataLoader worker: the parent's OpenMP pool does not survive a fork).
int num_threads();

}  // namespace pc3d
