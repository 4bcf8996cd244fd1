//! The handover of a guest: tracking, saving, relinquishing, loading, and resuming.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use memlane_protocol::PageSet;
use memlane_protocol::wire::attach::{Request, RunState};

use super::*;
use crate::shared::SharedWords;

#[test]
fn a_guest_is_tracked_saved_and_relinquished() {
    let mut bench = Bench::new(RunState::Running);
    let (daemon, hello) = bench.welcome();
    assert_eq!((hello.run_state, hello.bond), (RunState::Running, None));
    daemon.refused(Request::Harvest, "not been started");
    let (outcome, descriptors) = daemon.ask_with(Request::StartTracking, &[]);
    assert_eq!(outcome, Ok([0, 0]));
    let words = SharedWords::map(&descriptors[0], PageSet::words_needed(PAGES)).unwrap();
    let dirty = PageSet::over(PAGES, words).unwrap();
    daemon.refused(Request::StartTracking, "already");
    daemon.refused(Request::WriteProtect { first: 4, pages: 5 }, "the guest has 8 pages");
    daemon.refused(Request::WriteProtect { first: u64::MAX, pages: 1 }, "beyond");
    daemon.ask(Request::WriteProtect { first: 0, pages: 5 }).unwrap();
    daemon.ask(Request::WriteProtect { first: 5, pages: 3 }).unwrap();
    assert_eq!(daemon.ask(Request::Harvest).unwrap()[1], 3);
    assert_eq!(dirty.next_run(0, PAGES), Some(2..5));
    assert_eq!(bench.vmm.lock().unwrap().phases, [TrackingPhase::Started, TrackingPhase::WriteProtected]);

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
    assert_eq!((hello.run_state, hello.bond), (RunState::Relinquished, Some(bond(7))));
    assert!(!bench.is_running() && !bench.vmm.lock().unwrap().tracker.on);
    assert_eq!(bench.vmm.lock().unwrap().phases.last(), Some(&TrackingPhase::Stopped));
    daemon.refused(Request::StartTracking, "given up");
    daemon.refused(Request::Relinquish(bond(8)), "another migration");
    daemon.ask(Request::Discard).unwrap();
    assert!(matches!(bench.ended(), Ended::Discarded));
    assert!(bench.vmm.lock().unwrap().discarded && !bench.is_running());
}

#[test]
fn a_relinquished_guest_runs_again_only_when_told() {
    let bench = Bench::new(RunState::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask(PAUSE).unwrap();
    daemon.ask(Request::Relinquish(bond(7))).unwrap();
    daemon.ask(Request::Resume).unwrap();
    assert!(bench.is_running());
    drop(daemon);
    let (_daemon, hello) = bench.welcome();
    assert_eq!((hello.run_state, hello.bond), (RunState::Running, None));
}

#[test]
fn an_awaited_guest_arrives_and_runs_when_told() {
    let bench = Bench::new(RunState::Incoming);
    let (daemon, hello) = bench.welcome();
    assert_eq!(hello.run_state, RunState::Incoming);
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
    assert_eq!(hello.run_state, RunState::Incoming);
    daemon.ask_with(load.clone(), &[state.as_fd()]).0.unwrap();
    assert_eq!(bench.vmm.lock().unwrap().state, b"arrived");
    let (again, _) = daemon.ask_with(load.clone(), &[state.as_fd()]);
    assert!(again.unwrap_err().contains("has not run yet"));
    daemon.ask(Request::Prepare(bond(9))).unwrap();
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!((hello.run_state, hello.bond), (RunState::Loaded, Some(bond(9))));
    assert!(!bench.is_running());
    daemon.ask(Request::Resume).unwrap();
    assert!(bench.is_running());
    drop(daemon);
    assert_eq!(bench.welcome().1.run_state, RunState::Running);
}
