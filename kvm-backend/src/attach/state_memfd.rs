//! The memfd in which a guest's state passes between VMM and daemon.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use rustix::fs::{FileType, MemfdFlags, SealFlags};

use super::VmmError;

/// Returns a memfd that holds `state`, sealed so that it cannot change any more.
///
/// # Errors
///
/// The state is too long, or the kernel refused.
pub(super) fn seal_state(state: &[u8]) -> Result<OwnedFd, VmmError> {
    if state.len() as u64 > MAX_STATE_BYTES {
        return Err(
            format!("the state has {} bytes, at most {MAX_STATE_BYTES} can be moved", state.len()).into()
        );
    }
    let memfd = rustix::fs::memfd_create("vmm-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(memfd);
    file.write_all_at(state, 0)?;
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    Ok(file.into())
}

/// Returns a copy of the first `bytes` bytes of a daemon's memfd, which cannot change while the VMM reads it.
///
/// # Errors
///
/// The descriptor is no memfd, or is shorter or longer than a state can be.
pub(super) fn read_state(file: &File, bytes: u64) -> Result<Vec<u8>, VmmError> {
    let stat = rustix::fs::fstat(file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err("the state's descriptor is no memfd".into());
    }
    if u64::try_from(stat.st_size).unwrap_or(0) < bytes || bytes > MAX_STATE_BYTES {
        return Err(format!("the state's memfd has {} bytes, not {bytes}", stat.st_size).into());
    }
    let mut state = vec![0; bytes as usize];
    file.read_exact_at(&mut state, 0)?;
    Ok(state)
}
