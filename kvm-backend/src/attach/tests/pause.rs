//! A paused guest whose daemon hangs or goes away.

use std::time::Duration;

use memlane_protocol::wire::attach::{Request, RunState};

use super::*;

/// A daemon that hangs in the pause keeps its connection, and says what it would have said when it is late.
#[test]
fn a_paused_guest_does_not_wait_for_a_daemon_that_hangs() {
    let bench = Bench::new(RunState::Running);
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

#[test]
fn a_paused_guest_runs_on_without_its_daemon() {
    let bench = Bench::new(RunState::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask_with(Request::StartTracking, &[]).0.unwrap();
    daemon.ask(PAUSE).unwrap();
    daemon.ask(PAUSE).unwrap();
    drop(daemon);
    let (daemon, hello) = bench.welcome();
    assert_eq!(hello.run_state, RunState::Running);
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
    let mut bench = Bench::new(RunState::Running);
    let (daemon, _) = bench.welcome();
    daemon.ask(PAUSE).unwrap();
    assert!(matches!(bench.attachment.take().unwrap().stop(), Ended::Stopped));
    assert!(bench.is_running() && daemon.receive().is_none());
}
