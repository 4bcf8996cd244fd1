use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memlane_protocol::wire::attach::{
    Bond, FromVmm, Hello, MAX_PACKET_BYTES, Reply, Request, Standing, ToVmm, VERSIONS,
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
use crate::userfault::{Faults, MISSING, Userfault};

const PAGES: u64 = 8;
const PAUSE: Request = Request::Pause { limit_nanoseconds: 0 };

/// Of this number's migration.
fn bond(number: u8) -> Bond {
    Bond { migration: [number; 16], peer: "host-b".parse().unwrap(), fetching: number == 9 }
}

/// A VMM without a guest, which notes what was asked of it.
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
    armed: u64,
}

impl DirtyTracker for FakeTracker {
    fn kind(&self) -> TrackerKind {
        TrackerKind::Log
    }

    fn start(&mut self) -> Result<(), TrackError> {
        self.on = true;
        Ok(())
    }

    fn arm(&mut self, pages: Range<u64>) -> Result<(), TrackError> {
        if pages.end > PAGES {
            return Err(TrackError::Range { pages, limit: PAGES });
        }
        self.armed += pages.end - pages.start;
        Ok(())
    }

    fn armed(&self) -> u64 {
        self.armed
    }

    fn harvest(&mut self, into: &PageSet<SharedWords>) -> Result<u64, TrackError> {
        Ok(into.insert_range(2..5))
    }

    fn stop(&mut self) -> Result<(), TrackError> {
        (self.on, self.armed) = (false, 0);
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
    fn new(standing: Standing) -> Self {
        Self::with(standing, false)
    }

    fn with(standing: Standing, refusal_is_final: bool) -> Self {
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
            running: standing == Standing::Running,
            discarded: false,
            state: b"registers".to_vec(),
            phases: Vec::new(),
            fails: None,
        }));
        let attachment = Some(serve(Options { socket, standing, refusal_is_final }, vmm.clone()).unwrap());
        Self { listener, vmm, attachment, _directory: directory }
    }

    /// Takes the next connection and its greeting.
    fn accept(&self) -> (Daemon, Hello) {
        wait_for(self.listener.as_fd());
        let daemon = Daemon(rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap());
        let (message, descriptors) = daemon.receive().expect("a greeting");
        let FromVmm::Hello(hello) = message else { panic!("{message:?}") };
        assert_eq!((hello.oldest, hello.newest), VERSIONS);
        let regions = hello.shape.regions.iter().copied().zip(descriptors).collect();
        assert_eq!(GuestRam::map(regions).unwrap().pages(), PAGES);
        (daemon, hello)
    }

    fn welcome(&self) -> (Daemon, Hello) {
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

#[test]
fn a_guest_is_tracked_saved_and_given_up() {
    let mut bench = Bench::new(Standing::Running);
    let (daemon, hello) = bench.welcome();
    assert_eq!((hello.standing, hello.bond), (Standing::Running, None));
    daemon.refused(Request::Harvest, "not been started");
    let (outcome, descriptors) = daemon.ask_with(Request::StartTracking, &[]);
    assert_eq!(outcome, Ok([0, 0]));
    let words = SharedWords::map(&descriptors[0], PageSet::words_needed(PAGES)).unwrap();
    let dirty = PageSet::over(PAGES, words).unwrap();
    daemon.refused(Request::StartTracking, "already");
    daemon.refused(Request::Arm { first: 4, pages: 5 }, "lie outside");
    daemon.refused(Request::Arm { first: u64::MAX, pages: 1 }, "beyond");
    daemon.ask(Request::Arm { first: 0, pages: 5 }).unwrap();
    daemon.ask(Request::Arm { first: 5, pages: 3 }).unwrap();
    assert_eq!(daemon.ask(Request::Harvest).unwrap()[1], 3);
    assert_eq!(dirty.next_run(0, PAGES), Some(2..5));
    assert_eq!(bench.vmm.lock().unwrap().phases, [TrackingPhase::Started, TrackingPhase::Armed]);

    daemon.refused(Request::Save, "paused first");
    daemon.refused(Request::Relinquish(bond(7)), "paused first");
    daemon.refused(Request::Discard, "not relinquished");
    let paused_at = daemon.ask(PAUSE).unwrap()[0];
    assert!(paused_at > 0 && !bench.is_running());
    let (outcome, descriptors) = daemon.ask_with(Request::Save, &[]);
    let mut state = String::new();
    File::from(descriptors.into_iter().next().unwrap()).read_to_string(&mut state).unwrap();
    assert_eq!((outcome.unwrap()[0], state.as_str()), (9, "registers"));
    daemon.ask(Request::Relinquish(bond(7))).unwrap();

    // The daemon goes away: tracking ends, and the guest stays paused.
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!((hello.standing, hello.bond), (Standing::Relinquished, Some(bond(7))));
    assert!(!bench.is_running() && !bench.vmm.lock().unwrap().tracker.on);
    assert_eq!(bench.vmm.lock().unwrap().phases.last(), Some(&TrackingPhase::Stopped));
    daemon.refused(Request::StartTracking, "given up");
    daemon.refused(Request::Relinquish(bond(8)), "another migration");
    daemon.ask(Request::Discard).unwrap();
    assert!(matches!(bench.ended(), Ended::Discarded));
    assert!(bench.vmm.lock().unwrap().discarded && !bench.is_running());
}

#[test]
fn a_guest_that_was_given_up_runs_again_only_when_told() {
    let bench = Bench::new(Standing::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask(PAUSE).unwrap();
    daemon.ask(Request::Relinquish(bond(7))).unwrap();
    daemon.ask(Request::Resume).unwrap();
    assert!(bench.is_running());
    drop(daemon);
    let (_daemon, hello) = bench.welcome();
    assert_eq!((hello.standing, hello.bond), (Standing::Running, None));
}

/// A daemon that hangs in the pause keeps its connection, and says what it would have said when it is late.
#[test]
fn a_paused_guest_does_not_wait_for_a_daemon_that_hangs() {
    let bench = Bench::new(Standing::Running);
    let (daemon, _) = bench.welcome();
    let pause = Request::Pause { limit_nanoseconds: 50_000_000 };
    let runs_on = || {
        for _ in 0..2000 {
            if bench.is_running() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    };
    daemon.ask(pause.clone()).unwrap();
    assert!(!bench.is_running());
    assert!(runs_on(), "it runs on by itself");
    daemon.refused(Request::Save, "paused first");
    daemon.refused(Request::Relinquish(bond(7)), "paused first");
    daemon.ask(Request::Resume).unwrap();

    // One that cannot be resumed at first is resumed later.
    daemon.ask(pause.clone()).unwrap();
    bench.vmm.lock().unwrap().fails = Some("resume");
    std::thread::sleep(Duration::from_millis(100));
    assert!(!bench.is_running());
    bench.vmm.lock().unwrap().fails = None;
    assert!(runs_on(), "it runs on by itself");

    // One that was given up in time waits, as does one whose pause has no limit.
    daemon.ask(pause.clone()).unwrap();
    daemon.ask(Request::Relinquish(bond(7))).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!bench.is_running());
    daemon.ask(Request::Resume).unwrap();
    daemon.ask(PAUSE).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!bench.is_running());
}

/// A thread of the VMM waits for a page that never comes, with the VMM's lock held: it is let go.
#[test]
fn a_discarded_guest_keeps_nobody_waiting_for_its_memory() {
    let mut bench = Bench::new(Standing::Incoming);
    let (daemon, _) = bench.welcome();
    let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: true }, &[]);
    if let Err(reason) = reply {
        return memlane_lab::say_skipped("a discarded guest's memory", &reason);
    }
    let userfault = Userfault::from_fd(descriptors.into_iter().next().unwrap(), MISSING).unwrap();
    let page = bench.vmm.lock().unwrap().ram.slices(0..1).next().unwrap().ptr as u64;
    userfault.register(page..page + PAGE_SIZE, Faults::Missing).unwrap();
    daemon.ask_with(Request::Load { bytes: 1 }, &[memfd(b"x").as_fd()]).0.unwrap();
    let vmm = bench.vmm.clone();
    let waits = std::thread::spawn(move || {
        let vmm = vmm.lock().unwrap();
        // SAFETY: the page is mapped as long as the VMM has the RAM.
        unsafe { vmm.ram.slices(0..1).next().unwrap().ptr.read_volatile() }
    });
    wait_for(userfault.as_fd());
    drop(userfault);
    daemon.ask(Request::Discard).unwrap();
    assert_eq!(waits.join().unwrap(), 0);
    assert!(matches!(bench.ended(), Ended::Discarded));
    assert!(bench.vmm.lock().unwrap().discarded);
}

#[test]
fn a_paused_guest_runs_on_without_its_daemon() {
    let bench = Bench::new(Standing::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask_with(Request::StartTracking, &[]).0.unwrap();
    daemon.ask(PAUSE).unwrap();
    daemon.ask(PAUSE).unwrap();
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!(hello.standing, Standing::Running);
    assert!(bench.is_running() && !bench.vmm.lock().unwrap().tracker.on);

    // A pause that fails half way is undone too, and so is one whose undoing fails at first.
    bench.vmm.lock().unwrap().fails = Some("pause");
    daemon.refused(PAUSE, "cannot pause");
    assert!(!bench.is_running());
    bench.vmm.lock().unwrap().fails = Some("resume");
    drop(daemon);
    let (daemon, _) = bench.welcome();
    assert!(!bench.is_running());
    bench.vmm.lock().unwrap().fails = None;
    drop(daemon);
    bench.welcome();
    assert!(bench.is_running());
}

#[test]
fn ending_the_attachment_lets_a_paused_guest_run() {
    let mut bench = Bench::new(Standing::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask(PAUSE).unwrap();
    assert!(matches!(bench.attachment.take().unwrap().stop(), Ended::Stopped));
    assert!(bench.is_running() && daemon.receive().is_none());
}

#[test]
fn an_awaited_guest_arrives_and_runs_when_told() {
    let bench = Bench::new(Standing::Incoming);
    let (daemon, hello) = bench.welcome();
    assert_eq!(hello.standing, Standing::Incoming);
    for request in [Request::Resume, PAUSE, Request::Save, Request::StartTracking] {
        daemon.refused(request, "no guest has arrived");
    }
    let state = memfd(b"arrived");
    let load = Request::Load { bytes: 7 };
    daemon.refused(load.clone(), "0 descriptors came with it instead of 1");
    let (two, _) = daemon.ask_with(load.clone(), &[state.as_fd(), state.as_fd()]);
    assert!(two.unwrap_err().contains("2 descriptors"));
    let (short, _) = daemon.ask_with(Request::Load { bytes: 8 }, &[state.as_fd()]);
    assert!(short.unwrap_err().contains("7 bytes, not 8"));
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let (no_file, _) = daemon.ask_with(load.clone(), &[pipe.as_fd()]);
    assert!(no_file.unwrap_err().contains("no memfd"));
    bench.vmm.lock().unwrap().fails = Some("load");
    assert_eq!(daemon.ask_with(load.clone(), &[state.as_fd()]).0, Err("cannot load".into()));
    bench.vmm.lock().unwrap().fails = None;

    // Lost before anything is loaded: it is awaited as before.
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!(hello.standing, Standing::Incoming);
    daemon.ask_with(load.clone(), &[state.as_fd()]).0.unwrap();
    assert_eq!(bench.vmm.lock().unwrap().state, b"arrived");
    let (again, _) = daemon.ask_with(load.clone(), &[state.as_fd()]);
    assert!(again.unwrap_err().contains("has not run yet"));
    daemon.ask(Request::Prepare(bond(9))).unwrap();
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!((hello.standing, hello.bond), (Standing::Loaded, Some(bond(9))));
    assert!(!bench.is_running());
    daemon.ask(Request::Resume).unwrap();
    assert!(bench.is_running());
    drop(daemon);
    assert_eq!(bench.welcome().1.standing, Standing::Running);
}

#[test]
fn daemons_that_make_no_sense_are_left_and_tried_again() {
    let bench = Bench::new(Standing::Running);
    let greetings: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; MAX_PACKET_BYTES + 1],
        &ToVmm::Welcome { version: VERSIONS.1 + 1 }.encode(),
        &ToVmm::Request { id: 1, request: PAUSE }.encode(),
    ];
    for greeting in greetings {
        let (daemon, _) = bench.accept();
        packet::send(&daemon.0, greeting, &[]).unwrap();
        assert!(daemon.receive().is_none());
    }
    let (daemon, _) = bench.accept();
    daemon.send(&ToVmm::Refused { reason: "the name is taken".into() }, &[]);
    assert!(daemon.receive().is_none());

    // Descriptors that no request asked for are refused with it, and do not pile up.
    let (daemon, _) = bench.welcome();
    let (reply, _) = daemon.ask_with(PAUSE, &[daemon.0.as_fd()]);
    assert!(reply.unwrap_err().contains("1 descriptors") && bench.is_running());
    // What is no /dev/userfaultfd makes no userfaultfd, and two are one too many.
    let open = Request::OpenUserfault { keep: false };
    let (reply, _) = daemon.ask_with(open.clone(), &[daemon.0.as_fd()]);
    assert!(reply.unwrap_err().contains("making a userfaultfd"));
    let (reply, _) = daemon.ask_with(open.clone(), &[daemon.0.as_fd(); 2]);
    assert!(reply.unwrap_err().contains("2 descriptors"));
    // Nonsense in the middle counts as a lost connection.
    daemon.ask(PAUSE).unwrap();
    daemon.send(&ToVmm::Welcome { version: VERSIONS.1 }, &[]);
    assert!(daemon.receive().is_none());
    bench.welcome();
    assert!(bench.is_running());
}

/// Whoever waits for a missing page of a guest waits on without a daemon, where it wanted that.
#[test]
fn a_userfaultfd_is_handed_over_and_kept() {
    let test = "handing a userfaultfd over";
    for standing in [Standing::Running, Standing::Incoming] {
        let bench = Bench::new(standing);
        let (daemon, _) = bench.welcome();
        let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: true }, &[]);
        if let Err(reason) = reply {
            return memlane_lab::say_skipped(test, &reason);
        }
        let [userfault, _pagemap, maps] = <[OwnedFd; 3]>::try_from(descriptors).unwrap();
        let mut text = String::new();
        File::from(maps).read_to_string(&mut text).unwrap();
        assert!(text.contains("-"), "{text}");
        let userfault = Userfault::from_fd(userfault, MISSING).unwrap();
        let ram = bench.vmm.lock().unwrap().ram.clone();
        let page = ram.slices(0..1).next().unwrap().ptr as u64;
        userfault.register(page..page + PAGE_SIZE, Faults::Missing).unwrap();
        // SAFETY: mapped as long as `ram` lives, which the thread holds.
        let read = move || unsafe { ram.slices(0..1).next().unwrap().ptr.read_volatile() };
        let reader = std::thread::spawn(read);
        wait_for(userfault.as_fd());
        drop((userfault, daemon));
        let (daemon, _) = bench.welcome();
        if standing == Standing::Running {
            std::thread::sleep(Duration::from_millis(5));
            assert!(!reader.is_finished());
            let (reply, descriptors) = daemon.ask_with(Request::OpenUserfault { keep: false }, &[]);
            assert_eq!((reply, descriptors.len()), (Ok([0; 2]), 3));
        }
        assert_eq!(reader.join().unwrap(), 0);
    }
}

#[test]
fn a_refusal_is_final_where_the_caller_says_so() {
    let mut bench = Bench::with(Standing::Running, true);
    let (daemon, _) = bench.accept();
    daemon.send(&ToVmm::Refused { reason: "no room".into() }, &[]);
    assert!(matches!(bench.ended(), Ended::Refused(reason) if reason == "no room"));
}

#[test]
fn no_daemon_is_no_error_but_a_wrong_standing_is() {
    let vmm = Bench::new(Standing::Running).vmm.clone();
    let options = |standing| Options {
        socket: PathBuf::from("/nonexistent/attach.sock"),
        standing,
        refusal_is_final: true,
    };
    let attachment = serve(options(Standing::Running), vmm.clone()).unwrap();
    assert!(!attachment.is_finished());
    drop(attachment);
    assert!(serve(options(Standing::Loaded), vmm).is_err());
}
