//! The CRC32C that frames carry which are sent while the guest stands still.

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::{Content, Frame, Run};

/// CRC32C over the memory of all runs with data, in order.
pub fn checksum(ram: &GuestRam, runs: &[Run]) -> u32 {
    let data = runs.iter().filter(|run| run.content == Content::Data);
    data.flat_map(|run| ram.slices(run.pages.clone())).fold(0, |sum, slice| {
        // SAFETY: the slice is mapped as long as `ram` lives, and the guest stands still, here
        // because it is paused and there because it has not begun to run.
        let bytes = unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) };
        crc32c::crc32c_append(sum, bytes)
    })
}

/// Checks the payload of a frame from a guest that stands still: it always has a sum.
pub fn check_still(frame: &Frame, payload: &[u8]) -> Result<(), WireError> {
    if frame.checksum.is_none() && !payload.is_empty() {
        return Err(WireError::Checksum { what: "frame", found: 0, computed: crc32c::crc32c(payload) });
    }
    check(frame, || crc32c::crc32c(payload))
}

/// Checks the sum of a frame, if it has one, against what `compute` makes of its payload.
///
/// # Errors
///
/// If they differ.
pub fn check(frame: &Frame, compute: impl Fn() -> u32) -> Result<(), WireError> {
    match frame.checksum.map(|found| (found, compute())) {
        Some((found, computed)) if found != computed => {
            Err(WireError::Checksum { what: "frame", found, computed })
        }
        _ => Ok(()),
    }
}
