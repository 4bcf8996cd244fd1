//! A daemon's end of the attach socket, and a VMM without a guest.

mod connection;
mod handover;
mod pause;
mod userfault;

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memlane_protocol::wire::attach::{
    Bond, FromVmm, MAX_PACKET_BYTES, Reply, Request, RunState, ToVmm, VERSIONS, VmmHello,
};
use memlane_protocol::wire::machine::{Machine, TrackerKind};
use memlane_protocol::{PAGE_SIZE, PageSet};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::*;
use crate::dirty::TrackError;
use crate::packet;
use crate::ram::Backing;
use crate::shared::SharedWords;

const PAGES: u64 = 8;
const PAUSE: Request = Request::Pause { limit_nanoseconds: 0 };

/// Returns the bond of the migration of this number.
fn bond(number: u8) -> Bond {
    Bond { migration: [number; 16], peer: "host-b".parse().unwrap(), fetching: number == 9 }
}

/// A VMM without a guest, which notes what was requested.
struct Fake {
    ram: Arc<GuestRam>,
    tracker: FakeTracker,
    running: bool,
    discarded: bool,
    state: Vec<u8>,
    phases: Vec<TrackingPhase>,
    fails: Option<&'static str>,
}

#[derive(Default)]
struct FakeTracker {
    on: bool,
    protected: u64,
}

impl DirtyTracker for FakeTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Log
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.on = true;
        Ok(())
    }

    fn write_protect(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        if pages.end > PAGES {
            return Err(TrackError::Range { pages, limit: PAGES });
        }
        self.protected += pages.end - pages.start;
        Ok(())
    }

    fn write_protected_pages(&self) -> u64 {
        self.protected
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        Ok(into.insert_range(2..5))
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        (self.on, self.protected) = (false, 0);
        Ok(())
    }
}

impl Fake {
    fn outcome(&self, what: &str) -> Result<(), VmmError> {
        if self.fails == Some(what) { Err(format!("cannot {what}").into()) } else { Ok(()) }
    }
}

impl Vmm for Fake {
    fn shape(&self) -> GuestShape {
        GuestShape {
            name: "web1".parse().unwrap(),
            tracker: TrackerKind::Log,
            machine: Machine {
                vmm: "fake".parse().unwrap(),
                state_version: 1,
                vcpus: 1,
                features: 0,
                tsc_khz: 0,
                xcr0: 0,
                xsave_bytes: 0,
                cpuid: Vec::new(),
                msrs: Vec::new(),
            },
            regions: self.ram.regions().to_vec(),
            nics: Vec::new(),
        }
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.running = false;
        self.outcome("pause")
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.outcome("resume")?;
        self.running = true;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        self.outcome("save")?;
        Ok(self.state.clone())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        self.outcome("load")?;
        self.state = state.to_vec();
        Ok(())
    }

    fn discard(&mut self) {
        self.discarded = true;
    }

    fn tracking_changed(&mut self, phase: TrackingPhase) {
        self.phases.push(phase);
    }
}

/// A daemon's attach socket, and the VMM that is kept attached to it.
struct Bench {
    listener: OwnedFd,
    vmm: Arc<Mutex<Fake>>,
    attachment: Option<Attachment>,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new(run_state: RunState) -> Self {
        Self::with(run_state, false)
    }

    fn with(run_state: RunState, refusal_is_final: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("attach.sock");
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        rustix::net::listen(&listener, 4).unwrap();
        let layout = [(0, 4 * PAGE_SIZE), (1 << 20, 4 * PAGE_SIZE)];
        let vmm = Arc::new(Mutex::new(Fake {
            ram: Arc::new(GuestRam::create(&layout, &Backing::Memfd).unwrap()),
            tracker: FakeTracker::default(),
            running: run_state == RunState::Running,
            discarded: false,
            state: b"registers".to_vec(),
            phases: Vec::new(),
            fails: None,
        }));
        let attachment = Some(serve(Options { socket, run_state, refusal_is_final }, vmm.clone()).unwrap());
        Self { listener, vmm, attachment, _directory: directory }
    }

    /// Takes the next connection and its greeting.
    fn accept(&self) -> (Daemon, VmmHello) {
        wait_for(self.listener.as_fd());
        let daemon = Daemon(rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap());
        let (message, descriptors) = daemon.receive().expect("a greeting");
        let FromVmm::Hello(hello) = message else { panic!("{message:?}") };
        assert_eq!((hello.oldest, hello.newest), VERSIONS);
        let regions = hello.shape.regions.iter().copied().zip(descriptors).collect();
        assert_eq!(GuestRam::map(regions).unwrap().pages(), PAGES);
        (daemon, hello)
    }

    fn welcome(&self) -> (Daemon, VmmHello) {
        let (daemon, hello) = self.accept();
        daemon.send(&ToVmm::Welcome { version: VERSIONS.1 }, &[]);
        (daemon, hello)
    }

    fn is_running(&self) -> bool {
        self.vmm.lock().unwrap().running
    }

    fn ended(&mut self) -> Ended {
        self.attachment.take().unwrap().wait()
    }
}

/// The daemon's end of a connection.
struct Daemon(OwnedFd);

impl Daemon {
    fn send(&self, message: &ToVmm, descriptors: &[BorrowedFd<'_>]) {
        packet::send(&self.0, &message.encode(), descriptors).unwrap();
    }

    /// The next message, or `None` where the VMM has closed the connection.
    fn receive(&self) -> Option<(FromVmm, Vec<OwnedFd>)> {
        wait_for(self.0.as_fd());
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        match packet::recv(&self.0, &mut buffer) {
            Ok((0, _)) | Err(_) => None,
            Ok((len, descriptors)) => Some((FromVmm::decode(&buffer[..len]).unwrap(), descriptors)),
        }
    }

    fn ask_with(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> (Result<[u64; 2], String>, Vec<OwnedFd>) {
        let id = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec as u32;
        self.send(&ToVmm::Request { id, request }, descriptors);
        let (message, descriptors) = self.receive().expect("a reply");
        let FromVmm::Reply(Reply { id: replied, outcome }) = message else { panic!("{message:?}") };
        assert_eq!(replied, id);
        (outcome, descriptors)
    }

    fn ask(&self, request: Request) -> Result<[u64; 2], String> {
        let (outcome, descriptors) = self.ask_with(request, &[]);
        assert!(descriptors.is_empty());
        outcome
    }

    fn refused(&self, request: Request, part: &str) {
        let reason = self.ask(request.clone()).unwrap_err();
        assert!(reason.contains(part), "{request:?}: {reason}");
    }
}

fn wait_for(fd: BorrowedFd<'_>) {
    let mut ready = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let patience = Timespec::try_from(Duration::from_secs(20)).unwrap();
    let found = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&patience))).unwrap();
    assert_eq!(found, 1, "nothing came");
}

fn memfd(bytes: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}
