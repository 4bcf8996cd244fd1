//! Memory of the program that is to be checked.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Maps memory whose pages exist once they are touched.
pub(crate) fn map(bytes: u64) -> Result<&'static mut [u64], String> {
    let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let address = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes as usize, access, flags) }
        .map_err(|error| format!("taking {bytes} bytes of memory to check: {error}"))?;
    // SAFETY: the mapping is of this length, zeroed, aligned to a page, ours alone, and never given back.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast(), bytes as usize / size_of::<u64>()) })
}
