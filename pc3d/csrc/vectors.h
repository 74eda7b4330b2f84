// Registers of kWidth floats: part of the kernels that are compiled once per instruction set. It is included inside their
// namespace, so that no function of it is shared between instruction sets; hence no include guard.

constexpr int64_t kWidth = PC3D_WIDTH;

typedef float Vec __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Int __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Loose __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Vec load(const float *p) { return *reinterpret_cast<const Loose *>(p); }
inline void store(float *p, Vec v) { *reinterpret_cast<Loose *>(p) = v; }
inline Vec splat(float s) { return Vec{} + s; }

// v, in a register: compilers like to load it anew for each use, which makes loads the bottleneck.
inline Vec held(Vec v) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif (PC3D_WIDTH == 8 && defined(__AVX__)) || (PC3D_WIDTH == 4 && defined(__SSE__))
  asm("" : "+x"(v));
#endif
  return v;
}

// As the instructions have it: b where one of them is NaN.
inline Vec larger(Vec a, Vec b) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xFFFF, a, b);
#elif PC3D_WIDTH == 8 && defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Vec smaller(Vec a, Vec b) {
#if PC3D_WIDTH == 16 && defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xFFFF, a, b);
#elif PC3D_WIDTH == 8 && defined(__AVX__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Sum and maximum of the lanes: halves onto each other, quarters onto each other, then lane by lane.
typedef float Half __attribute__((vector_size(kWidth / 2 * sizeof(float))));
typedef float Quarter __attribute__((vector_size(kWidth / 4 * sizeof(float))));

inline float total(Vec v) {
  Half half[2];
  memcpy(half, &v, sizeof v);
  half[0] += half[1];
  Quarter quarter[2];
  memcpy(quarter, half, sizeof half[0]);
  quarter[0] += quarter[1];
  float sum = quarter[0][0];
  for (int64_t i = 1; i < kWidth / 4; ++i) sum += quarter[0][i];
  return sum;
}
inline float largest(Vec v) {
  Half half[2];
  memcpy(half, &v, sizeof v);
  half[0] = half[0] > half[1] ? half[0] : half[1];
  Quarter quarter[2];
  memcpy(quarter, half, sizeof half[0]);
  quarter[0] = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  float best = quarter[0][0];
  for (int64_t i = 1; i < kWidth / 4; ++i) best = quarter[0][i] > best ? quarter[0][i] : best;
  return best;
}

// Powers of two beside a polynomial (Cephes); 2 ulp. Saturates at 2^-126 and 2^127.5, NaN stays.
inline Vec exponential(Vec x) {
  x = smaller(splat(88.37626f), larger(splat(-87.33654f), x));
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec t = x * 1.44269504f + shift;
  const Vec k = t - shift;
  const Vec r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(p) + (reinterpret_cast<Int>(t) << 23));
}

// 2^x for x <= 0, 2 ulp (Cephes). Saturates at 2^-126, NaN stays.
inline Vec power_of_two(Vec x) {
  x = larger(splat(-126.0f), x);
  const float shift = 12582912.0f;
  const Vec t = x + shift;
  const Vec r = x - (t - shift);
  Vec p = splat(1.535336188e-4f);
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(p) + (reinterpret_cast<Int>(t) << 23));
}
