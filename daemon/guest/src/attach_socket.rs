//! VMMs attach their guests, and shims make themselves known, over the socket of this module.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use memlane_kvm::ram::{GuestRam, RamError};
use memlane_kvm::{descriptors, packet};
use memlane_net::log_limiter::LogLimiter;
use memlane_net::task;
use memlane_net::unix_socket::{Peer, peer};
use memlane_protocol::wire::attach::{FromVmm, MAX_PACKET_BYTES, RunState, ToVmm, VERSIONS, VmmHello};
use memlane_protocol::wire::hello::common_version;
use memlane_protocol::wire::{Label, WireError};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use super::accounts::{Accounts, Amount, LimitError, Share};
use super::guest::Guest;
use super::linked::{Linked, receive, send};
use super::process::{Process, ProcessError};
use super::registry::Guests;
use super::shim::{self, Shims};
use super::users::Users;
use crate::config::AttachConfig;

/// A VMM may take this long to introduce itself.
const GREETING: Duration = Duration::from_secs(5);
/// A connection takes this many file descriptors: its own, and that of its process.
const OF_CONNECTION: u64 = 2;

/// The attach socket needs to know which users may attach what, and where guests and shims are listed.
pub struct Attaching {
    /// The VMMs of these user ids may attach guests.
    pub users: Vec<u32>,
    /// A guest that this daemon starts has one of these users, as whom its QEMU may attach a shim and nothing else.
    pub guest_users: Rc<Users>,
    /// The VMMs of each user may take this much.
    pub limits: AttachConfig,
    /// Guests are listed here.
    pub guests: Rc<Guests>,
    /// Shims are listed here.
    pub shims: Rc<Shims>,
}

/// Makes the socket, in place of one that an earlier daemon left behind.
///
/// # Errors
///
/// Fails if a process listens there already, or if the socket cannot be made.
pub fn bind(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    memlane_net::unix_socket::make_way(path)?;
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(64)?;
    // Who may attach is decided by the user id of the process that connects.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    watch(socket.into())
}

fn watch(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Takes in VMMs and shims for as long as the daemon runs.
pub async fn serve(listener: AsyncFd<OwnedFd>, attaching: Rc<Attaching>) {
    let (accounts, told) = (Rc::<Accounts>::default(), Rc::<RefCell<LogLimiter<_>>>::default());
    loop {
        match accept(&listener).await {
            Ok(socket) => {
                let (attaching, accounts, told) = (attaching.clone(), accounts.clone(), told.clone());
                task::spawn("attaching VMM", async move {
                    let Err(refused) = greet(socket, &attaching, &accounts).await else { return };
                    let Refused { user, pid, reason: error } = refused;
                    // Every program may connect, as often as it likes.
                    if let Some(left_out) = told.borrow_mut().say((user, error.to_string())) {
                        warn!(user, pid, %error, left_out, "a VMM or a shim could not attach");
                    }
                });
            }
            Err(error) => {
                let error = descriptors::explain(error);
                warn!(%error, "cannot accept a VMM's connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    use rustix::net::{SocketFlags, accept_with};
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(result) = ready.try_io(|listener| Ok(accept_with(listener.get_ref(), flags)?)) {
            return result;
        }
    }
}

/// A process has introduced itself as one of these, and agreed on a version of the protocol.
enum Introduced {
    Vmm(Box<VmmHello>, Arc<GuestRam>, Process, u16, Share),
    Shim(u16, Share),
}

/// This process could not attach, for this reason.
struct Refused {
    user: u32,
    pid: u32,
    reason: AttachRefusal,
}

/// A process that connected could not attach a guest or a shim. It is told the text, which is also logged.
#[derive(Debug, thiserror::Error)]
enum AttachRefusal {
    /// The kernel does not tell which process has connected.
    #[error(transparent)]
    Peer(io::Error),
    /// The user that the process runs as may not attach guests.
    #[error("user {0} may not attach guests; see attach_users in the configuration")]
    User(u32),
    /// The user is that of a guest, and the process is not the QEMU that the daemon has started for it.
    #[error("user {0} is that of a guest, and this process is not the guest's QEMU")]
    GuestProcess(u32),
    /// The user is that of a guest, whose QEMU has a shim and is no VMM that attaches.
    #[error("user {0} is that of a guest that the daemon has started; its QEMU may attach no other")]
    GuestUser(u32),
    /// The user's processes have taken as much as they may.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The process cannot be watched.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The connection failed.
    #[error("its connection broke: {0}")]
    Connection(io::Error),
    /// The process closed the connection and had sent nothing.
    #[error("it hung up without a word")]
    HungUp,
    /// The process did not introduce itself in time.
    #[error("it did not say who it is")]
    Silent,
    /// The first packet is a reply, which answers nothing.
    #[error("it began with a reply instead of a hello")]
    Reply,
    /// The first packet does not follow the attach protocol.
    #[error("its hello is not understood: {0}")]
    Hello(WireError),
    /// The process speaks no version of the attach protocol that the daemon speaks.
    #[error(
        "the daemon speaks versions {} to {} of the attach protocol and the {who} speaks {} to {}; \
         upgrade the older one",
        VERSIONS.0, VERSIONS.1, theirs.0, theirs.1
    )]
    Version {
        /// This is what the process is, in words.
        who: &'static str,
        /// These are the oldest and the newest version that it speaks.
        theirs: (u16, u16),
    },
    /// As many shims are connected as there may be.
    #[error("{} shims are connected already, which is all that there may be", shim::MOST)]
    ShimsFull,
    /// A guest of this name is attached.
    #[error("a guest named {0} is attached already; give each its own name")]
    NameTaken(Label),
    /// The guest's memory regions and the descriptors that came for them differ in number.
    #[error("guest {guest} has {regions} memory regions, and {descriptors} descriptors came")]
    Descriptors {
        /// This is the guest.
        guest: Label,
        /// This many regions were named.
        regions: usize,
        /// This many descriptors came.
        descriptors: usize,
    },
    /// The guest's memory cannot be mapped.
    #[error("memory of guest {guest}: {source}")]
    Memory {
        /// This is the guest.
        guest: Label,
        /// This is why.
        source: RamError,
    },
}

async fn greet(socket: OwnedFd, attaching: &Attaching, accounts: &Rc<Accounts>) -> Result<(), Refused> {
    let unknown = |error| Refused { user: u32::MAX, pid: 0, reason: AttachRefusal::Peer(error) };
    let peer = peer(&socket).map_err(unknown)?;
    let refused = |reason| Refused { user: peer.uid, pid: peer.pid, reason };
    attach(socket, attaching, accounts, peer).await.map_err(refused)
}

async fn attach(
    socket: OwnedFd,
    attaching: &Attaching,
    accounts: &Rc<Accounts>,
    Peer { pid, uid }: Peer,
) -> Result<(), AttachRefusal> {
    let broken = AttachRefusal::Connection;
    let take = |amount| accounts.take(uid, amount, &attaching.limits);
    let process = Process::running(pid);
    let of_guest = attaching.guest_users.contains(uid);
    let is_guest = |process: &Process| attaching.guest_users.is_guest(uid, process.identity());
    let greeting = match (of_guest, &process) {
        (true, Ok(process)) if is_guest(process) => a_turn(accounts, uid, &attaching.limits).await,
        (true, _) => Err(AttachRefusal::GuestProcess(uid)),
        (false, _) if attaching.users.contains(&uid) => a_turn(accounts, uid, &attaching.limits).await,
        (false, _) => Err(AttachRefusal::User(uid)),
    };
    let socket = watch(socket).map_err(broken)?;
    let introduced = async {
        let _greeting = greeting?;
        // A VMM of which it cannot be told whether it lives is none to leave a guest with.
        let process = process?;
        let received = receive(&socket).await.map_err(broken)?;
        let (packet, descriptors) = received.ok_or(AttachRefusal::HungUp)?;
        match FromVmm::decode(&packet) {
            Ok(FromVmm::Hello(_)) if of_guest => Err(AttachRefusal::GuestUser(uid)),
            Ok(FromVmm::Hello(hello)) => {
                introduce(hello, descriptors, &attaching.guests, process, take).await
            }
            Ok(FromVmm::Shim { oldest, newest }) => {
                let version = agree("shim", (oldest, newest))?;
                if !attaching.shims.has_room(pid) {
                    return Err(AttachRefusal::ShimsFull);
                }
                let share = take(Amount { descriptors: OF_CONNECTION, ..Amount::default() })?;
                Ok(Introduced::Shim(version, share))
            }
            Ok(FromVmm::Reply(_)) => Err(AttachRefusal::Reply),
            Err(error) => Err(AttachRefusal::Hello(error)),
        }
    };
    let introduced = tokio::time::timeout(GREETING, introduced).await;
    let introduced = match introduced.unwrap_or(Err(AttachRefusal::Silent)) {
        Ok(introduced) => introduced,
        Err(reason) => {
            let _ = send(&socket, &ToVmm::Refused { reason: reason.to_string() }.encode(), &[]).await;
            // A greeting left unread would reset the connection, and hide the reason behind that.
            let _ = packet::recv(socket.get_ref(), &mut vec![0; MAX_PACKET_BYTES]);
            return Err(reason);
        }
    };
    let (vmm, version, share) = match introduced {
        Introduced::Vmm(hello, ram, process, version, share) => (Some((hello, ram, process)), version, share),
        Introduced::Shim(version, share) => (None, version, share),
    };
    let welcomed = send(&socket, &ToVmm::Welcome { version }.encode(), &[]).await;
    let Some((hello, ram, process)) = vmm else {
        // Children of VMMs have one too, and come and go: one that is gone already is no news.
        if welcomed.is_ok() {
            attaching.shims.add(pid, version, socket, share);
        }
        return Ok(());
    };
    welcomed.map_err(broken)?;
    let VmmHello { run_state, bond, shape, .. } = *hello;
    info!(guest = %shape.name, vmm = %shape.machine.vmm, pid, ?run_state, "a VMM attached");
    if !ram.is_sealed() {
        info!(guest = %shape.name, "its memory is a file that cannot be sealed: if its VMM cuts it, the guest cannot be moved");
    }
    let driver = Rc::new(Linked::new(socket, version, Some(ram.clone())));
    let guest = Rc::new(Guest::new(shape, ram, driver, Rc::new(process), run_state));
    guest.bond.replace(bond.filter(|_| matches!(run_state, RunState::Relinquished | RunState::Loaded)));
    let of_guest = guest.driver.clone();
    task::spawn("share of an attached VMM", async move {
        of_guest.gone().await;
        drop(share);
    });
    // That it was sent away was said.
    let _ = attaching.guests.attach(guest);
    Ok(())
}

/// Waits until a connection of this user may introduce itself: after a daemon's restart all VMMs of a host come
/// at once, and most hosts run them all as one user.
async fn a_turn(
    accounts: &Rc<Accounts>,
    uid: u32,
    limits: &AttachConfig,
) -> Result<[Share; 2], AttachRefusal> {
    const LOOK: Duration = Duration::from_millis(20);
    let connection = Amount { connections: 1, descriptors: OF_CONNECTION, ..Amount::default() };
    let connection = accounts.take(uid, connection, limits)?;
    let until = tokio::time::Instant::now() + GREETING;
    loop {
        match accounts.take(uid, Amount { greeting: 1, ..Amount::default() }, limits) {
            Ok(greeting) => return Ok([connection, greeting]),
            Err(crowd) if tokio::time::Instant::now() >= until => return Err(crowd.into()),
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Checks everything that a VMM said, and maps its guest's memory.
async fn introduce(
    hello: VmmHello,
    descriptors: Vec<OwnedFd>,
    guests: &Guests,
    process: Process,
    take: impl Fn(Amount) -> Result<Share, LimitError>,
) -> Result<Introduced, AttachRefusal> {
    let version = agree("VMM", (hello.oldest, hello.newest))?;
    let name = &hello.shape.name;
    if guests.get(name).is_some() {
        return Err(AttachRefusal::NameTaken(name.clone()));
    }
    let (regions, found) = (hello.shape.regions.len(), descriptors.len());
    if regions != found {
        return Err(AttachRefusal::Descriptors { guest: name.clone(), regions, descriptors: found });
    }
    let bytes = hello.shape.regions.iter().map(|region| region.bytes).fold(0, u64::saturating_add);
    let descriptors_held = OF_CONNECTION + found as u64;
    let share = take(Amount { guests: 1, descriptors: descriptors_held, bytes, ..Amount::default() })?;
    let regions = hello.shape.regions.iter().copied().zip(descriptors).collect();
    let ram = task::aside(move || GuestRam::map(regions).inspect(GuestRam::mark_as_observer)).await;
    let ram = ram.map_err(|source| AttachRefusal::Memory { guest: name.clone(), source })?;
    Ok(Introduced::Vmm(Box::new(hello), Arc::new(ram), process, version, share))
}

fn agree(who: &'static str, theirs: (u16, u16)) -> Result<u16, AttachRefusal> {
    common_version(VERSIONS, theirs).ok_or(AttachRefusal::Version { who, theirs })
}
