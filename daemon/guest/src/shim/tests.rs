//! In these tests the test plays shims that connect to the attach socket.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use memlane_kvm::packet;
use memlane_kvm::userfault::{Userfault, WRITE_PROTECT_ASYNC};
use memlane_protocol::wire::attach::{FromVmm, Reply, Request, ToVmm, VERSIONS};
use memlane_protocol::wire::starter::GuestUsers;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::*;
use crate::attach_socket::{self, Attaching};
use crate::linked::{receive, send};
use crate::memory::name_of;
use crate::users::Users;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(10);

/// An attach socket of a host without guests.
struct Bench {
    shims: Rc<Shims>,
    socket: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Bench {
    async fn new(users: &[u32]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("attach.sock");
        let shims = Rc::<Shims>::default();
        let (guests, limits) = Default::default();
        let (users, guest_users) = (users.to_vec(), Users::new(GuestUsers::default()));
        let attaching = Rc::new(Attaching { users, guest_users, limits, guests, shims: shims.clone() });
        let listener = attach_socket::bind(&socket).unwrap();
        memlane_net::task::spawn("attach socket", attach_socket::serve(listener, attaching));
        Self { shims, socket, _directory: directory }
    }

    /// Makes a connection that sends `greeting`. Returns it with the daemon's answer.
    async fn greet(&self, greeting: FromVmm) -> (Peer, Option<ToVmm>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.socket).unwrap()).unwrap();
        // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
        let peer = Peer(unsafe { AsyncFd::register(socket) }.unwrap());
        packet::send(peer.0.get_ref(), &greeting.encode(), &[]).unwrap();
        let answer = peer.receive().await;
        (peer, answer)
    }

    async fn shim(&self) -> Peer {
        let (peer, answer) = self.greet(FromVmm::Shim { oldest: 1, newest: 9 }).await;
        assert_eq!(answer, Some(ToVmm::Welcome { version: VERSIONS.1 }));
        peer
    }

    /// Checks that the greeting is refused, with this text in the reason.
    async fn refuses(&self, greeting: FromVmm, part: &str) {
        let (peer, answer) = self.greet(greeting).await;
        let Some(ToVmm::Refused { reason }) = answer else { panic!("{answer:?}") };
        assert!(reason.contains(part), "{reason}");
        assert_eq!(peer.receive().await, None);
    }
}

/// The shim's end of a connection.
struct Peer(AsyncFd<OwnedFd>);

impl Peer {
    async fn receive(&self) -> Option<ToVmm> {
        let packet = timeout(LONG, receive(&self.0)).await.expect("something comes").unwrap();
        packet.map(|(bytes, _)| ToVmm::decode(&bytes).unwrap())
    }

    /// Takes the request for a userfaultfd. Returns its number, and the device that was lent with it.
    async fn asked(&self) -> (u32, Option<OwnedFd>) {
        let (bytes, mut lent) = timeout(LONG, receive(&self.0)).await.unwrap().unwrap().unwrap();
        let Ok(ToVmm::Request { id, request: Request::OpenUserfault { keep: false } }) =
            ToVmm::decode(&bytes)
        else {
            panic!("{bytes:?}")
        };
        assert!(lent.len() <= 1);
        (id, lent.pop())
    }

    async fn reply(&self, id: u32, outcome: Result<[u64; 2], String>, descriptors: &[BorrowedFd<'_>]) {
        let reply = FromVmm::Reply(Reply { id, outcome });
        send(&self.0, &reply.encode(), descriptors).await.unwrap();
    }
}

fn is_connected(shims: &Shims, pid: u32) -> bool {
    shims.connected.borrow().contains_key(&pid)
}

fn me() -> u32 {
    std::process::id()
}

#[test]
fn shims_come_and_go() {
    tokio_uring::start(async {
        let bench = Bench::new(&[rustix::process::geteuid().as_raw()]).await;
        let shims = &bench.shims;
        assert!(!is_connected(shims, me()) && !shims.wait_for(me(), SHORT).await);
        let missing = shims.open_userfault(me(), false).await.unwrap_err();
        assert!(matches!(missing, ShimError::Missing(pid) if pid == me()));
        assert!(missing.to_string().contains("LD_PRELOAD="), "{missing}");

        let first = bench.shim().await;
        assert!(shims.wait_for(me(), LONG).await && is_connected(shims, me()));
        assert!(!is_connected(shims, 1));
        // The same process once more, as after it has run another program.
        let second = bench.shim().await;
        assert_eq!(first.receive().await, None);
        drop(first);
        tokio::time::sleep(SHORT).await;
        assert!(is_connected(shims, me()));
        drop(second);
        let gone = async {
            while is_connected(shims, me()) {
                tokio::time::sleep(SHORT).await;
            }
        };
        timeout(LONG, gone).await.unwrap();
    });
}

#[test]
fn strangers_are_refused() {
    tokio_uring::start(async {
        let shim = |oldest, newest| FromVmm::Shim { oldest, newest };
        let bench = Bench::new(&[12345]).await;
        bench.refuses(shim(VERSIONS.0, VERSIONS.1), "see attach_users").await;
        let bench = Bench::new(&[rustix::process::geteuid().as_raw()]).await;
        bench.refuses(shim(VERSIONS.1 + 1, VERSIONS.1 + 2), "the shim speaks 6 to 7").await;
        // No more than there is room for, except in the place of one of the same process.
        let shims = &bench.shims;
        let socket = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let kind = SocketType::SEQPACKET;
            let (here, _) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
            // SAFETY: the descriptor is owned by the value, and never replaced or closed under it.
            Rc::new(Linked::new(unsafe { AsyncFd::register(here) }.unwrap(), VERSIONS.1, None))
        };
        let one = socket();
        let others = (0..MOST as u32).map(|pid| (u32::MAX - pid, one.clone()));
        shims.connected.send_modify(|connected| connected.extend(others));
        bench.refuses(shim(VERSIONS.0, VERSIONS.1), "1024 shims are connected").await;
        shims.connected.send_modify(|connected| {
            connected.remove(&u32::MAX);
            connected.insert(me(), socket());
        });
        assert_eq!(shims.connected.borrow().len(), MOST);
        bench.shim().await;
    });
}

#[test]
fn what_a_shim_hands_over_is_looked_at() {
    tokio_uring::start(async {
        let bench = Bench::new(&[rustix::process::geteuid().as_raw()]).await;
        let shims = &bench.shims;
        let shim = bench.shim().await;
        assert!(shims.wait_for(me(), LONG).await);
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let [pagemap, maps] =
            ["pagemap", "maps"].map(|name| File::open(format!("/proc/self/{name}")).unwrap());
        let status = File::open("/proc/self/status").unwrap();
        let like_maps = File::create(bench.socket.with_file_name("maps")).unwrap();
        let exchange = async |outcome, descriptors: Vec<BorrowedFd<'_>>| {
            let answered = async {
                let (id, _device) = shim.asked().await;
                shim.reply(id, outcome, &descriptors).await;
            };
            tokio::join!(shims.open_userfault(me(), false), answered).0
        };
        let (pipe, pagemap, maps, status) = (pipe.as_fd(), pagemap.as_fd(), maps.as_fd(), status.as_fd());
        if let Ok(userfault) = Userfault::open(WRITE_PROTECT_ASYNC) {
            let userfault = userfault.as_fd();
            exchange(Ok([7; 2]), vec![userfault, pagemap, maps]).await.unwrap();
            for wrong in [
                vec![],
                vec![userfault, pagemap],
                vec![userfault, pagemap, maps, maps],
                vec![pipe, pagemap, maps],
                vec![userfault, maps, pagemap],
                vec![userfault, pipe, maps],
                vec![userfault, pagemap, pipe],
                vec![userfault, pagemap, status],
                vec![userfault, pagemap, like_maps.as_fd()],
            ] {
                let count = wrong.len();
                let error = exchange(Ok([0; 2]), wrong).await.unwrap_err();
                assert!(matches!(error, ShimError::Broken { .. }), "{count} descriptors: {error}");
            }
        } else {
            assert!(exchange(Ok([0; 2]), vec![pipe, pagemap, maps]).await.is_err());
        }
        // What the failure is put down to depends on whether this process may open the device.
        let may = File::options().read(true).write(true).open(DEVICE).is_ok();
        let error = exchange(Err("no seats".into()), vec![]).await.unwrap_err();
        assert_eq!(matches!(error, ShimError::Failed { .. }), may, "{error}");
        assert!(error.to_string().contains("no seats"), "{error}");
    });
}

#[test]
fn the_device_is_lent_and_a_lost_shim_is_noticed() {
    tokio_uring::start(async {
        let bench = Bench::new(&[rustix::process::geteuid().as_raw()]).await;
        let shims = &bench.shims;
        let shim = bench.shim().await;
        assert!(shims.wait_for(me(), LONG).await);
        let lost = async {
            let (_, device) = shim.asked().await;
            let may = File::options().read(true).write(true).open(DEVICE).is_ok();
            assert_eq!(device.map(|device| name_of(&device).unwrap()), may.then(|| DEVICE.to_owned()));
            drop(shim);
        };
        let (outcome, ()) = tokio::join!(shims.open_userfault(me(), false), lost);
        let error = outcome.unwrap_err();
        assert!(matches!(error, ShimError::Broken { .. }), "{error}");
    });
}

#[test]
fn a_late_answer_is_not_taken_for_the_next() {
    tokio_uring::start(async {
        let bench = Bench::new(&[rustix::process::geteuid().as_raw()]).await;
        let shims = &bench.shims;
        let shim = bench.shim().await;
        assert!(shims.wait_for(me(), LONG).await);
        let error = shims.open_userfault(me(), false).await.unwrap_err();
        assert!(matches!(error, ShimError::Slow { after: PATIENCE, .. }), "{error}");
        let (late, _device) = shim.asked().await;
        let answered = async {
            let (id, _device) = shim.asked().await;
            shim.reply(late, Err("the first".into()), &[]).await;
            shim.reply(id, Err("the second".into()), &[]).await;
        };
        let (outcome, ()) = tokio::join!(shims.open_userfault(me(), false), answered);
        assert!(outcome.unwrap_err().to_string().contains("the second"));
    });
}
