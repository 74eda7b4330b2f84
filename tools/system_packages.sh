#!/bin/sh
# System packages on Debian/Ubuntu: a compiler and venv for the set-up, and what Open3D needs to draw. Installed when run as
# root; otherwise one line says what to install and the set-up goes on.
missing=""
have_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }
command -v g++ >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 || missing="$missing g++"
"${PYTHON:-python3}" -c 'import ensurepip' >/dev/null 2>&1 || missing="$missing python3-venv"
have_library libusb-1.0.so.0 || missing="$missing libusb-1.0-0"
have_library libGL.so.1 || missing="$missing libgl1"
have_library libEGL.so.1 || missing="$missing libegl1"
have_library libX11.so.6 || missing="$missing libx11-6"
have_library libgomp.so.1 || missing="$missing libgomp1"
have_library libvulkan.so.1 || missing="$missing libvulkan1"
ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1 || missing="$missing mesa-vulkan-drivers"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "setup: installing$missing"
  if apt-get update -qq >/dev/null 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1; then
    exit 0
  fi
fi
echo "setup: please install with your package manager:$missing (without the graphics ones, pictures rendered by Open3D are skipped)"
