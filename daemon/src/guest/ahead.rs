//! Mapping a guest's memory when its VMM comes, and not while it is sent or received.

use std::io;
use std::sync::{Arc, Weak};

use memlane_kvm::ram::GuestRam;
use memlane_protocol::PAGE_SIZE;
use tracing::{debug, warn};

/// Pages that are mapped in one go, which whoever changes this process's mappings meanwhile waits for. For
/// the same reason the thread has no lower priority than others: on a busy host they would all wait for it.
const PIECE_PAGES: u64 = (4 << 20) / PAGE_SIZE;

/// Maps into this process, in the background, what memory the VMM has taken already: that of a guest
/// that runs when the daemon is started anew, or all of a VMM's that was told to take it before its guest
/// comes. A page that is received where there is no mapping costs a fault, which is more than receiving
/// it. Of memory that nobody has touched, nothing is taken.
pub fn map_ahead(guest: String, ram: &Arc<GuestRam>) {
    let ram = Arc::downgrade(ram);
    let work = move || match map_held(&ram) {
        Ok(()) => debug!(guest, "the guest's memory is mapped"),
        Err(error) => {
            debug!(guest, %error, "cannot map the guest's memory ahead; it is slower to receive")
        }
    };
    if let Err(error) = std::thread::Builder::new().name("map-ahead".into()).spawn(work) {
        warn!(%error, "cannot start a thread that maps a guest's memory");
    }
}

/// Maps until all is mapped, or nobody has the memory any more.
fn map_held(ram: &Weak<GuestRam>) -> io::Result<()> {
    let extents = match ram.upgrade() {
        Some(ram) => ram.data_extents(0..ram.pages())?,
        None => Vec::new(),
    };
    for extent in extents {
        for first in extent.clone().step_by(PIECE_PAGES as usize) {
            let Some(ram) = ram.upgrade() else { return Ok(()) };
            ram.map_pages(first..(first + PIECE_PAGES).min(extent.end))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use memlane_kvm::ram::Backing;

    use super::*;

    #[test]
    fn what_is_held_is_mapped_and_nothing_is_taken() {
        let ram = Arc::new(GuestRam::create(&[(0, 8 << 20)], &Backing::Memfd).unwrap());
        ram.prepare(100..164).unwrap();
        map_held(&Arc::downgrade(&ram)).unwrap();
        assert_eq!(ram.data_extents(0..ram.pages()).unwrap(), vec![100..164]);
        let gone = Arc::downgrade(&ram);
        drop(ram);
        map_held(&gone).unwrap();
    }
}
