//! A Linux for QEMU guests: Debian's cloud kernel, and an initramfs of `memlane-init` with the modules it needs.

mod cpio;
mod guest;
mod initramfs;
mod kernel;

pub(crate) use cpio::CpioArchive;
pub use guest::{Accelerator, LinuxGuest};
pub use initramfs::Initramfs;
pub use kernel::Kernel;
