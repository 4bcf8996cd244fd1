//! This module starts the QEMU that receives a guest, from the guest file that came with the offer.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use memlane_guest::Guest;
use memlane_guest::qemu::definition::Definition;
use memlane_guest::qemu::{Lacking, QemuError};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::{Offer, Refusal, RefusalKind};

use crate::context::Context;

/// Storage may take this long to say whether a disk is there.
const STORAGE: Duration = Duration::from_secs(5);

/// Starts a QEMU that waits for the guest, if the guest brings what that takes and this host lets the peer do so.
///
/// # Errors
///
/// Returns the reasons for which the guest cannot come.
pub(super) async fn launch_incoming(
    context: &Rc<Context>,
    peer: &Label,
    offer: &Offer,
) -> Result<Rc<Guest>, Vec<Refusal>> {
    let name = &offer.shape.name;
    let refused = |what, reason: String| Err(vec![Refusal { what, reason }]);
    let Some(brought) = offer.qemu.as_ref().filter(|qemu| !qemu.definition.is_empty()) else {
        let how = match offer.qemu {
            Some(_) => "start a QEMU with -incoming defer and take it in with `memlanectl attach --incoming`",
            None => "start one with --incoming and that name",
        };
        return refused(RefusalKind::Receiver, format!("no VMM waits for a guest named {name}; {how}"));
    };
    if !context.peer(peer).is_some_and(|peer| peer.may_start_guests) {
        let reason = format!(
            "no VMM waits for a guest named {name}, and {peer} may not have one started here; set may_start_guests \
             = true for [[peer]] {peer}, or start it with `memlanectl launch --incoming`"
        );
        return refused(RefusalKind::Receiver, reason);
    }
    let file = format!("the guest file from {peer}");
    let definition = match Definition::parse(Path::new(&file), &brought.definition) {
        Ok(definition) if definition.name == *name => definition,
        Ok(definition) => {
            let reason = format!("the guest file that came with guest {name} is that of {}", definition.name);
            return refused(RefusalKind::Receiver, reason);
        }
        Err(error) => return refused(RefusalKind::Receiver, error.to_string()),
    };
    let disks = missing(brought.disks.clone()).await;
    if !disks.is_empty() {
        return Err(disks);
    }
    let definition = definition.with_machine(&brought.machine);
    context.qemu.launch_incoming(definition).await.map_err(|error| vec![refusal(error)])
}

/// Returns refusals for the disks that are not here. They may be on storage that does not answer at all.
async fn missing(disks: Vec<String>) -> Vec<Refusal> {
    let look = tokio::task::spawn_blocking(move || {
        disks.into_iter().filter(|disk| !Path::new(disk).exists()).collect::<Vec<_>>()
    });
    let refuse = |reason| Refusal { what: RefusalKind::Disk, reason };
    let Ok(looked) = tokio::time::timeout(STORAGE, look).await else {
        return vec![refuse(format!(
            "the guest's disks cannot be looked at within {STORAGE:.0?}; see its storage"
        ))];
    };
    let reason = |disk: String| {
        format!(
            "disk {disk} is not there; disks do not travel: put it on storage that both hosts have under this path \
             (-drive file={disk})"
        )
    };
    looked.expect("looking does not panic").into_iter().map(|disk| refuse(reason(disk))).collect()
}

fn refusal(error: QemuError) -> Refusal {
    let (what, remedy) = match &error {
        QemuError::NoTap { .. } | QemuError::Tap { .. } => (RefusalKind::Network, ""),
        QemuError::Ended { lacks: Some(Lacking::Machine), .. } => (
            RefusalKind::Machine,
            "; install a newer QEMU there, or give the guest a machine type that both have (-machine)",
        ),
        QemuError::Ended { lacks: Some(Lacking::Cpu), .. } => {
            (RefusalKind::Machine, "; give the guest a CPU model that QEMU has on both hosts (-cpu)")
        }
        QemuError::NameTaken(_) => (RefusalKind::Busy, ""),
        _ => (RefusalKind::Receiver, ""),
    };
    Refusal { what, reason: format!("{error}{remedy}") }
}
