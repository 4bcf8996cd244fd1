//! The CRC32C that frames carry while the guest is paused.

use memlane_kvm::ram::GuestRam;
use memlane_protocol::wire::WireError;
use memlane_protocol::wire::frame::{Content, Frame, Run};

/// Computes the CRC32C of the memory of all runs with data, in order.
pub(crate) fn checksum(ram: &GuestRam, runs: &[Run]) -> u32 {
    let data = runs.iter().filter(|run| run.content == Content::Data);
    data.flat_map(|run| ram.slices(run.pages.clone())).fold(0, |sum, slice| {
        // SAFETY: the slice is mapped as long as `ram` lives, and the guest writes nothing: at the source
        // it is paused, and at the destination it has not begun to run.
        let bytes = unsafe { std::slice::from_raw_parts(slice.ptr, slice.len) };
        crc32c::crc32c_append(sum, bytes)
    })
}

/// Checks the payload of a frame from a paused guest. Such a frame must have a checksum.
///
/// # Errors
///
/// Fails if the frame has a payload without a checksum, or if the checksum does not fit the payload.
pub(crate) fn check_paused(frame: &Frame, payload: &[u8]) -> Result<(), WireError> {
    if frame.checksum.is_none() && !payload.is_empty() {
        return Err(WireError::Checksum { what: "frame", found: 0, computed: crc32c::crc32c(payload) });
    }
    check(frame, || crc32c::crc32c(payload))
}

/// Compares the checksum of a frame, if it has one, with the checksum of its payload, which `compute` returns.
///
/// # Errors
///
/// Fails if they differ.
pub(crate) fn check(frame: &Frame, compute: impl Fn() -> u32) -> Result<(), WireError> {
    match frame.checksum.map(|found| (found, compute())) {
        Some((found, computed)) if found != computed => {
            Err(WireError::Checksum { what: "frame", found, computed })
        }
        _ => Ok(()),
    }
}
