//! The source serves memory while the guest runs at the destination.
//!
//! The source does not know what is missing: each session, the first as well as any after a loss, begins with a list
//! from the destination. The guest is paused here, so that a page that is sent twice is the same both times.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use memlane_kvm::ram::GuestRam;
use memlane_lane::{SendState, Totals};
use memlane_net::link::{Link, LinkError};
use memlane_net::task;
use memlane_protocol::wire::control::Control;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::{info, warn};

use crate::context::Context;
use crate::handle::MigrationHandle;
use crate::lane_reconnect::LaneReconnector;
use crate::lanes::{self, LaneEnd, Lanes};
use crate::missing::{self, NoSuchPage};
use crate::preflight::{self, Findings};
use crate::progress::RamStats;
use crate::routes::{Route, Routes};

/// The destination's answer to the offer to serve may take this long: its VMM has to be asked.
const ANSWER: Duration = Duration::from_secs(15);
/// The lanes are looked at in these intervals.
const LOOK: Duration = Duration::from_millis(100);
/// A lost session is opened again after this time.
const AGAIN: Duration = Duration::from_millis(500);

/// Memory cannot be served, or not any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The connection for control failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The destination is not configured here.
    #[error("{0} is no peer of this host any more; add it as [[peer]]")]
    NoPeer(String),
    /// The destination cannot fetch.
    #[error("the destination cannot fetch: {0}")]
    Refused(String),
    /// The destination did not answer.
    #[error("the destination did not answer within {0:.0?}")]
    Slow(Duration),
    /// No lane could be opened.
    #[error("no port reaches the destination: {0}")]
    NoPort(String),
    /// The lane for faults, or all others, are lost.
    #[error("{0} to the destination is lost; see `memlanectl ports` and the daemon's log")]
    Lost(&'static str),
    /// The destination named a page that the guest does not have.
    #[error("the destination broke the protocol: {0}")]
    Protocol(#[from] NoSuchPage),
}

/// This says what is served, and to which host.
#[derive(Clone)]
pub(crate) struct PostcopySource {
    /// This is the context that every migration of this host works with.
    pub context: Rc<Context>,
    /// This is the migration.
    pub handle: Rc<MigrationHandle>,
    /// This is the guest's memory, which does not change any more once pages are asked for.
    pub ram: Arc<GuestRam>,
    /// If this is true, pages may be holes, which are not to be read.
    pub sparse: bool,
}

/// Serves until it is dropped.
pub(crate) struct Serving(JoinHandle<()>);

/// One connection for control, and its lanes.
struct ServeSession {
    link: Link,
    lanes: Lanes,
    reconnector: LaneReconnector,
    outbound: Arc<SendState>,
    bell: Arc<Notify>,
    /// This is the number of the lane for faults.
    faults: u16,
}

impl Serving {
    /// Opens the first session, and serves from then on.
    ///
    /// # Errors
    ///
    /// Fails if the first session cannot be opened.
    pub(crate) async fn begin(server: PostcopySource) -> Result<Self, ServeError> {
        let session = server.open().await?;
        Ok(Self(task::spawn("server of missing pages", server.serve(Some(session)))))
    }

    /// Serves as soon as the destination can be reached.
    pub(crate) fn again(server: PostcopySource) -> Self {
        Self(task::spawn("server of missing pages", server.serve(None)))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl PostcopySource {
    async fn serve(self, mut first: Option<ServeSession>) {
        let mut before = sent(&self.handle.progress.borrow().ram);
        let mut told = String::new();
        loop {
            let opened = match first.take() {
                Some(session) => Ok(session),
                None => self.open().await,
            };
            let error = match opened {
                Ok(mut session) => {
                    told.clear();
                    self.waits_for(None);
                    let error = self.serve_over(&mut session, before).await;
                    before = before + session.lanes.totals();
                    session.lanes.close().await;
                    error
                }
                Err(error) => error,
            };
            let MigrationHandle { guest, peer, .. } = &*self.handle;
            let error = error.to_string();
            // Not the same line twice a second for as long as a network is down.
            if error != told {
                warn!(%guest, %peer, error, "cannot serve a guest's missing pages; trying again");
            }
            self.waits_for(Some(format!("{peer}, which fetches pages from here: {error}")));
            told = error;
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn open(&self) -> Result<ServeSession, ServeError> {
        let (context, peer) = (&self.context, &self.handle.peer);
        let mut link = context.connect(peer).await?.ok_or_else(|| ServeError::NoPeer(peer.to_string()))?;
        link.send(&Control::Fetch(self.handle.id)).await?;
        let answer = tokio::time::timeout(ANSWER, link.receive()).await;
        let accept = match answer.map_err(|_| ServeError::Slow(ANSWER))?? {
            Control::Accept(accept) => accept,
            Control::Refuse(refusals) => {
                let reasons: Vec<String> = refusals.into_iter().map(|refusal| refusal.reason).collect();
                return Err(ServeError::Refused(reasons.join("; ")));
            }
            other => {
                let (expected, found) = ("the ports to serve over", other.name());
                return Err(LinkError::Unexpected { expected, found }.into());
            }
        };
        let mut findings = Findings::default();
        let mut pairs = preflight::try_ports(context, peer, &accept.ports, &mut findings).await;
        pairs.sort_by_key(|pair| pair.round_trip);
        let routes = Routes::new(context.clone(), peer.clone(), accept.token, &accept.ports);
        let faults = open_faults(&routes, &pairs).await;
        let ends = preflight::open_lanes(&routes, &pairs, &mut findings).await;
        let Some(faults) = faults.filter(|_| !ends.is_empty()) else {
            return Err(ServeError::NoPort(findings.reasons()));
        };
        let (bell, ring) = lanes::bell();
        let outbound = Arc::new(SendState::of_paused_guest(self.ram.clone(), ring));
        outbound.sparse.store(self.sparse, Ordering::Release);
        let mut lanes = Lanes::new(context);
        let number = faults.number;
        for end in ends {
            lanes.send(end, &outbound, context.limits().silence);
        }
        lanes.answer(faults, &outbound, context.limits().silence);
        info!(guest = %self.handle.guest, %peer, "ready to serve missing pages");
        Ok(ServeSession {
            link,
            lanes,
            reconnector: LaneReconnector::new(Rc::new(routes)),
            outbound,
            bell,
            faults: number,
        })
    }

    /// Serves until the session is lost. Returns why it was.
    async fn serve_over(&self, session: &mut ServeSession, before: Totals) -> ServeError {
        let silence = self.context.limits().silence;
        loop {
            let lanes = &session.lanes;
            let is_missing = |route: &Route| lanes.running_on(&route.port.name) < usize::from(route.lanes());
            tokio::select! {
                message = session.link.receive() => {
                    let heard = match message {
                        Ok(message) => self.hear(session, message).await,
                        Err(error) => Err(error.into()),
                    };
                    if let Err(error) = heard {
                        return error;
                    }
                }
                end = session.reconnector.next(is_missing) => {
                    session.lanes.send(end, &session.outbound, silence);
                }
                () = session.bell.notified() => {}
                () = tokio::time::sleep(LOOK) => self.show(session, before),
            }
            for lane in session.outbound.orphaned_lanes() {
                // Bytes in some buffer may come late: it is the same as what comes again.
                session.outbound.take_back(lane);
                if let Err(error) = session.link.send(&Control::LaneLost(lane)).await {
                    return error.into();
                }
            }
            if session.lanes.has_ended(session.faults) {
                return ServeError::Lost("the lane for faults");
            }
            if session.lanes.running() <= 1 {
                return ServeError::Lost("every lane");
            }
        }
    }

    async fn hear(&self, session: &ServeSession, message: Control) -> Result<(), ServeError> {
        match message {
            Control::Missing(missing) => {
                let (outbound, last) = (session.outbound.clone(), missing.last);
                let added = task::aside(move || missing::add(&missing, &outbound)).await;
                added?;
                if last {
                    session.outbound.publish();
                }
                Ok(())
            }
            Control::Fetched(report) => {
                self.handle.update(|progress| {
                    progress.ram.pages_remaining = report.remaining_pages;
                    progress.postcopy.get_or_insert_default().report(&report);
                });
                Ok(())
            }
            other => {
                let (expected, found) = ("missing pages", other.name());
                Err(LinkError::Unexpected { expected, found }.into())
            }
        }
    }

    fn show(&self, session: &mut ServeSession, before: Totals) {
        session.lanes.measure(true);
        self.handle.update(|progress| session.lanes.show(progress, before));
    }

    fn waits_for(&self, what: Option<String>) {
        self.handle.update(|progress| progress.postcopy.get_or_insert_default().waits_for = what);
    }
}

/// Returns what was sent of a guest so far.
fn sent(ram: &RamStats) -> Totals {
    Totals {
        wire_bytes: ram.bytes_sent,
        data_pages: ram.pages_sent,
        zero_pages: ram.zero_pages,
        uncompressed_bytes: ram.uncompressed_bytes,
        compressed_bytes: ram.compressed_bytes,
        ..Totals::default()
    }
}

/// Opens the lane for faults, on the port with the shortest round trip that works.
async fn open_faults(routes: &Routes, pairs: &[preflight::Pair]) -> Option<LaneEnd> {
    for pair in pairs {
        match routes.open_faults(&pair.route).await {
            Ok(end) => return Some(end),
            Err(error) => info!(%error, "cannot open the lane for faults on this port"),
        }
    }
    None
}
