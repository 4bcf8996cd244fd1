//! Daemons and VMMs that are killed in each phase of a migration. Before the commit the guest
//! runs on at its source, and a second attempt succeeds; after it the guest runs at the
//! destination, as soon as both daemons are back.

mod common;

use std::time::{Duration, Instant};

use common::{Stage, Tap, assert_runs, signal, wait_for_exit};
use memlane_api::types::Phase;
use memlane_lab::{HostId, LabOptions, LabProcess, wait_for};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::Control;
use rustix::net::sockopt::socket_type;
use rustix::net::{Shutdown, SocketType, shutdown};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};

/// A point of the protocol at which everything can be held up.
struct Point {
    name: &'static str,
    /// Who says the word.
    from: HostId,
    is: fn(&Control) -> bool,
}

const OFFERING: Point =
    Point { name: "offering", from: HostId::A, is: |message| matches!(message, Control::Offer(_)) };
/// All pages but those written lately are on their way; the guest runs.
const COPYING: Point =
    Point { name: "copying", from: HostId::B, is: |message| matches!(message, Control::HolesDone) };
/// The guest stands still, and both sides look at its memory.
const COMPARING: Point =
    Point { name: "comparing", from: HostId::B, is: |message| matches!(message, Control::Digests { .. }) };
/// All pages are there, and the destination does not know. (The VMM's state comes another way.)
const SWITCHING_OVER: Point = Point {
    name: "switching-over",
    from: HostId::A,
    is: |message| matches!(message, Control::State { bytes, .. } if bytes.is_empty()),
};
/// The destination has all of it but the last byte.
const LOADING: Point = Point {
    name: "loading",
    from: HostId::A,
    is: |message| matches!(message, Control::State { total, offset, .. } if offset + 1 == *total),
};
/// The destination has all it needs, and the source does not know.
const READY: Point = Point { name: "ready", from: HostId::B, is: |message| is_word(message, Message::Ready) };
/// The source has given the guest up, and the destination does not know.
const COMMITTED: Point =
    Point { name: "committed", from: HostId::A, is: |message| is_word(message, Message::Commit) };
/// The guest runs at the destination, and the source does not know.
const RUNNING: Point =
    Point { name: "running", from: HostId::B, is: |message| is_word(message, Message::Running) };
/// The source has ended it, and the destination does not know.
const DONE: Point = Point { name: "done", from: HostId::A, is: |message| is_word(message, Message::Done) };

const BEFORE_COMMIT: [Point; 6] = [OFFERING, COPYING, COMPARING, SWITCHING_OVER, LOADING, READY];

/// A VMM that is told to end takes less than this.
const ENDING: Duration = Duration::from_secs(5);

fn is_word(message: &Control, word: Message) -> bool {
    matches!(message, Control::Handover { message, .. } if *message == word)
}

/// Orders the guest named after the point to move, and returns when it is held up there. On a busy machine the
/// pause may be long; that is not what these tests are about.
fn begin(stage: &Stage, tap: &Tap, point: &Point) -> common::Order {
    tap.hold(point.from, point.is);
    let order = stage.begin(point.name, &["--verify", "--downtime-limit", "5s"]);
    tap.wait();
    order
}

#[test]
fn the_destination_daemon_is_killed_before_the_commit() {
    let test = "the_destination_daemon_is_killed_before_the_commit";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for point in BEFORE_COMMIT {
        eprintln!("{}", point.name);
        let mut guest = stage.guest(point.name);
        let mut there = stage.receiver(point.name);
        let order = begin(&stage, &tap, &point);
        stage.rig.stop_daemon(HostId::B).unwrap();
        tap.lose();
        // Refused (3): nothing had begun. Failed (4): the guest runs on at its source.
        order.expect(if point.name == OFFERING.name { 3 } else { 4 }, &["host"]);
        stage.assert_runs_on(point.name, &mut guest);

        stage.rig.start_daemon(HostId::B).unwrap();
        let ends = match point.name {
            name if name == READY.name => {
                wait_for_exit(there.process());
                true
            }
            // It was killed before the VMM got any of it, or after.
            name if name == LOADING.name => there.process().wait_timeout(ENDING).unwrap().is_some(),
            _ => false,
        };
        if ends {
            there = stage.receiver(point.name);
        }
        stage.assert_moves(point.name, &mut there);
        wait_for_exit(guest.process());
    }
}

#[test]
fn the_source_daemon_is_killed_before_the_commit() {
    let test = "the_source_daemon_is_killed_before_the_commit";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for point in BEFORE_COMMIT {
        eprintln!("{}", point.name);
        let mut guest = stage.guest(point.name);
        let mut there = stage.receiver(point.name);
        let order = begin(&stage, &tap, &point);
        stage.rig.stop_daemon(HostId::A).unwrap();
        tap.lose();
        order.expect(6, &["memlaned"]);
        // With no daemon there, the VMM lets its guest run on by itself.
        wait_for("the guest to run on", common::LONG, || {
            (guest.stats().unwrap()["standing"] == "running").then_some(())
        })
        .unwrap();
        assert_runs(&mut guest);

        stage.rig.start_daemon(HostId::A).unwrap();
        if [LOADING.name, READY.name].contains(&point.name) {
            // It holds a guest that the source has taken back: it must never run.
            wait_for_exit(there.process());
            there = stage.receiver(point.name);
        }
        stage.assert_moves(point.name, &mut there);
        wait_for_exit(guest.process());
    }
}

#[test]
fn a_daemon_is_killed_after_the_commit() {
    let test = "a_daemon_is_killed_after_the_commit";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for (id, point) in [
        (HostId::A, COMMITTED),
        (HostId::A, RUNNING),
        (HostId::A, DONE),
        (HostId::B, COMMITTED),
        (HostId::B, RUNNING),
        (HostId::B, DONE),
    ] {
        eprintln!("{} {id:?}", point.name);
        let mut guest = stage.guest(point.name);
        let mut there = stage.receiver(point.name);
        let mut order = Some(begin(&stage, &tap, &point));
        if point.name == DONE.name {
            // The source has ended it, and its VMM with it, and says so whatever comes then.
            wait_for_exit(guest.process());
            order.take().expect("it was given").expect(0, &[]);
        } else {
            assert_ne!(guest.stats().unwrap()["standing"], "running", "two owners");
        }
        stage.rig.stop_daemon(id).unwrap();
        tap.lose();
        stage.rig.start_daemon(id).unwrap();
        if let Some(order) = order {
            order.expect(if id == HostId::A { 6 } else { 0 }, &[]);
        }
        stage.wait_for_standing(HostId::B, point.name, "running");
        assert_runs(&mut there);
        wait_for_exit(guest.process());
        there.quit().unwrap();
    }
}

#[test]
fn the_destination_vmm_is_killed() {
    let test = "the_destination_vmm_is_killed";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for point in [COPYING, COMPARING, SWITCHING_OVER, LOADING, READY, COMMITTED] {
        eprintln!("{}", point.name);
        let mut guest = stage.guest(point.name);
        let mut there = stage.receiver(point.name);
        let order = begin(&stage, &tap, &point);
        there.process().kill().unwrap();
        tap.release();
        order.expect(4, &["gone"]);
        stage.assert_runs_on(point.name, &mut guest);
        let mut there = stage.receiver(point.name);
        stage.assert_moves(point.name, &mut there);
        wait_for_exit(guest.process());
    }
}

/// Nobody knows whether a VMM has run the guest that ended after it was told to; one that was gone before has not.
#[test]
fn a_vmm_that_was_not_told_to_run_the_guest_has_never_run_it() {
    let test = "a_vmm_that_was_not_told_to_run_the_guest_has_never_run_it";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    tap.hold(COMMITTED.from, COMMITTED.is);
    let order = stage.begin("web1", &["--downtime-limit", "5s"]);
    tap.wait();
    signal(there.process(), Signal::STOP);
    hang_up(there.process());
    stage.wait_for_log(HostId::B, "lost the connection to the VMM, which lives");
    tap.release();
    // It journals that the guest is its own, and finds nobody to tell.
    stage.wait_until(HostId::A, "web1", "the commit", |migration| migration.phase == Phase::Committing);
    std::thread::sleep(Duration::from_secs(1));
    there.process().kill().unwrap();
    order.expect(4, &["the destination gave up", "the guest's VMM"]);
    stage.assert_runs_on("web1", &mut guest);
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

/// Closes a VMM's connection to its daemon.
fn hang_up(vmm: &LabProcess) {
    let pid = Pid::from_raw(vmm.pid() as i32).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let numbers = std::fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap();
    let numbers = numbers.map(|entry| entry.unwrap().file_name().into_string().unwrap().parse().unwrap());
    let sockets = numbers.filter_map(|fd: i32| pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).ok());
    let mut found = sockets.filter(|fd| socket_type(fd).is_ok_and(|kind| kind == SocketType::SEQPACKET));
    shutdown(found.next().expect("its daemon's socket"), Shutdown::Both).unwrap();
}

#[test]
fn the_source_vmm_is_killed() {
    let test = "the_source_vmm_is_killed";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for point in [COPYING, COMPARING, SWITCHING_OVER, LOADING, READY] {
        eprintln!("{}", point.name);
        let mut guest = stage.guest(point.name);
        let mut there = stage.receiver(point.name);
        let order = begin(&stage, &tap, &point);
        guest.process().kill().unwrap();
        tap.release();
        let answer = order.expect(4, &["the guest's VMM is gone"]);
        assert!(answer.last().unwrap()["guest_runs_at"].is_null(), "{}", answer.text);
        // The destination is free for another guest of that name.
        stage.wait_until(HostId::B, point.name, "the end there", |migration| migration.outcome.is_some());
        if [SWITCHING_OVER.name, LOADING.name, READY.name].contains(&point.name) {
            // It has loaded a guest that must never run.
            wait_for_exit(there.process());
            there = stage.receiver(point.name);
        }
        let mut guest = stage.guest(point.name);
        stage.assert_moves(point.name, &mut there);
        wait_for_exit(guest.process());
    }

    // Given up already: the destination has all of it.
    let mut guest = stage.guest(COMMITTED.name);
    let mut there = stage.receiver(COMMITTED.name);
    let order = begin(&stage, &tap, &COMMITTED);
    guest.process().kill().unwrap();
    tap.release();
    order.expect(0, &[]);
    assert_runs(&mut there);
}

/// A source daemon that hangs in the pause does not keep the guest standing still: its VMM lets it run on, and what the
/// daemon says when it goes on comes too late.
#[test]
fn the_source_daemon_hangs_in_the_pause() {
    let test = "the_source_daemon_hangs_in_the_pause";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    for point in [LOADING, READY] {
        eprintln!("{}", point.name);
        let mut there = stage.receiver("web1");
        tap.hold(point.from, point.is);
        let order = stage.begin("web1", &["--downtime-limit", "2s"]);
        tap.wait();
        signal(stage.rig.daemon(HostId::A), Signal::STOP);
        tap.release();
        // Nobody tells it, and the connection to its daemon is as it was.
        wait_for("the guest to run on", common::LONG, || {
            (guest.stats().unwrap()["standing"] == "running").then_some(())
        })
        .unwrap();
        assert_runs(&mut guest);
        assert_ne!(there.stats().unwrap()["standing"], "running", "two owners");
        signal(stage.rig.daemon(HostId::A), Signal::CONT);
        order.expect(4, &[]);
        stage.assert_runs_on("web1", &mut guest);
        // It has loaded a guest that must never run.
        wait_for_exit(there.process());
    }
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

/// The limit lasts until the commit: a VMM that does not relinquish the guest in time keeps it.
#[test]
fn the_source_vmm_hangs_when_it_is_to_relinquish() {
    let test = "the_source_vmm_hangs_when_it_is_to_relinquish";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    tap.hold(READY.from, READY.is);
    let order = stage.begin("web1", &["--downtime-limit", "2s"]);
    tap.wait();
    let began = Instant::now();
    signal(guest.process(), Signal::STOP);
    tap.release();
    stage.wait_for_log(HostId::A, "too late to hand the guest over");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    signal(guest.process(), Signal::CONT);
    order.expect(4, &["downtime limit"]);
    stage.assert_runs_on("web1", &mut guest);
    wait_for_exit(there.process());
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

/// Whoever hangs instead of dying is given up too, by the silence or by the downtime limit.
#[test]
fn the_other_side_hangs() {
    let Some((mut stage, tap)) = Stage::tapped("the_other_side_hangs", LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    for point in [COPYING, LOADING] {
        eprintln!("{}: the destination daemon", point.name);
        tap.hold(point.from, point.is);
        let order = stage.begin("web1", &[]);
        tap.wait();
        signal(stage.rig.daemon(HostId::B), Signal::STOP);
        order.expect(4, &["has not answered"]);
        stage.assert_runs_on("web1", &mut guest);
        tap.lose();
        signal(stage.rig.daemon(HostId::B), Signal::CONT);
        stage.wait_for_end("web1");
    }

    eprintln!("the destination VMM, in the pause");
    tap.hold(HostId::A, LOADING.is);
    let order = stage.begin("web1", &["--downtime-limit", "5s"]);
    tap.wait();
    signal(there.process(), Signal::STOP);
    tap.release();
    order.expect(4, &["downtime limit"]);
    stage.assert_runs_on("web1", &mut guest);
    signal(there.process(), Signal::CONT);
    // It has loaded a guest that must never run.
    wait_for_exit(there.process());
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}
