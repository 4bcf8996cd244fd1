//! What surrounds the daemon, for metrics: whether ports and peers can be used, free memory, and room for the journal.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_migrate::preflight;
use memlane_net::config::PortConfig;
use memlane_net::port::{holds, interface_state};
use memlane_net::task;
use memlane_protocol::wire::Label;

use crate::host::Host;
use crate::metrics;

/// After peers were tried, they are not tried again for this time, however often metrics are read. It is longer than trying
/// takes.
const PAUSE: Duration = Duration::from_secs(15);
/// Whoever reads metrics waits no longer than this for the kernel to tell the rest.
const PATIENCE: Duration = Duration::from_secs(1);

/// What was seen.
pub(crate) struct Surroundings {
    /// The ports, and whether each can be used.
    pub ports: Vec<(Label, bool)>,
    /// How many bytes of memory can be used without swapping.
    pub available_memory: Option<u64>,
    /// How many bytes the daemon may still write to the file system of its journal, and how many it has in all.
    pub journal_room: Option<(u64, u64)>,
}

/// Looks at what surrounds the daemon when somebody reads metrics: nothing is done where nobody does.
#[derive(Default)]
pub(crate) struct Lookout {
    tried_peers: Cell<Option<Instant>>,
    looking: Rc<Cell<bool>>,
}

impl Lookout {
    /// Sets the gauges of what surrounds the daemon. Those of peers are set when these have answered.
    pub(crate) async fn look(&self, host: &Rc<Host>) {
        if self.tried_peers.get().is_none_or(|at| at.elapsed() > PAUSE) {
            self.tried_peers.set(Some(Instant::now()));
            (0..host.config.peers.len()).for_each(|number| try_peer(host.clone(), number));
        }
        // The kernel may keep whoever looks for as long as a disk or a network card hangs: one thread is enough for that.
        if self.looking.replace(true) {
            return;
        }
        let (ports, journal) = (host.config.ports.clone(), host.config.journal.clone());
        let looking = self.looking.clone();
        let look = task::spawn("look around", async move {
            metrics::surroundings(&task::aside(move || Surroundings::now(&ports, &journal)).await);
            looking.set(false);
        });
        let _ = tokio::time::timeout(PATIENCE, look).await;
    }
}

impl Surroundings {
    fn now(ports: &[PortConfig], journal: &Path) -> Self {
        Self {
            ports: ports.iter().map(|port| (port.name.clone(), is_up(port))).collect(),
            available_memory: preflight::available_memory(),
            journal_room: room(journal),
        }
    }
}

/// Returns whether a port can be used: it has a link and its address. It may block.
pub(crate) fn is_up(port: &PortConfig) -> bool {
    let carrier = port.interface.as_deref().map(|interface| interface_state(interface).0);
    // If the kernel does not answer, the port is assumed to be as configured.
    carrier.unwrap_or(true) && holds(port.address).unwrap_or(true)
}

fn try_peer(host: Rc<Host>, number: usize) {
    task::spawn("trying a peer", async move {
        let peer = &host.config.peers[number];
        let reached = preflight::greet(host.context(), peer).await;
        metrics::peer(peer.name.as_str(), reached.is_ok());
    });
}

/// Returns how many bytes are free in the file system of a directory for a user that is not root, and how many it has.
fn room(directory: &Path) -> Option<(u64, u64)> {
    let system = rustix::fs::statvfs(directory).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(system.f_frsize);
    Some((bytes(system.f_bavail), bytes(system.f_blocks)))
}
