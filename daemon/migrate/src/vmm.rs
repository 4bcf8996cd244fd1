//! This module follows a migration's VMM: whether it can be reached, and what happens to it.

use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::{Guest, Process};
use tokio::sync::mpsc;

use crate::handle::Returned;

/// The VMM, as far as it can be reached.
pub(crate) enum Vmm {
    /// The VMM is attached.
    Attached(Rc<Guest>),
    /// The connection to the VMM is lost, but it lives, and will attach again.
    Away(Rc<Process>),
    /// The process of the VMM has ended.
    Ended,
    /// This side is done with the VMM, which waits for another guest.
    Released,
}

/// An event of a VMM.
pub(crate) enum VmmNews {
    /// The connection to the VMM is lost.
    Lost(Rc<Process>),
    /// The VMM attached again.
    Back(Returned),
    /// The process of the VMM has ended.
    Ended,
}

/// Waits for what happens next to a VMM. `returns` brings VMMs that have attached again.
pub(crate) async fn news(vmm: &Vmm, returns: &mut mpsc::Receiver<Returned>) -> VmmNews {
    /// A process that ends closes its connections a little earlier.
    const ENDING: Duration = Duration::from_millis(200);
    match vmm {
        Vmm::Attached(guest) => {
            guest.driver.gone().await;
            match tokio::time::timeout(ENDING, guest.process.ended()).await {
                Ok(()) => VmmNews::Ended,
                Err(_) => VmmNews::Lost(guest.process.clone()),
            }
        }
        Vmm::Away(process) => {
            tokio::select! {
                Some(returned) = returns.recv() => VmmNews::Back(returned),
                () = process.ended() => VmmNews::Ended,
            }
        }
        Vmm::Ended | Vmm::Released => pending().await,
    }
}
