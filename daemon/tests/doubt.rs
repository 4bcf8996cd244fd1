//! Guests of which no host can tell alone whose they are: journals that are lost, hosts that burn,
//! operators who decide, and VMMs that claim to be others.

mod common;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use common::{LONG, Stage, Tap, assert_runs, signal, wait_for_exit};
use memlane_api::types::{Migration, Outcome};
use memlane_kvm::packet;
use memlane_kvm::ram::{Backing, GuestRam};
use memlane_lab::{CtlOutput, HostId, LabOptions, wait_for};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::attach::{
    Bond, FromVmm, MAX_PACKET_BYTES, Reply, Request, RunState, ToVmm, VERSIONS, VmmHello,
};
use memlane_protocol::wire::control::Control;
use memlane_protocol::wire::machine::GuestShape;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Signal;

/// Holds the migration of web1 up at the first word `word` that `from` says.
fn begin(stage: &Stage, tap: &Tap, from: HostId, word: Message) -> common::Order {
    tap.hold(from, move |message| matches!(message, Control::Handover { message, .. } if *message == word));
    let order = stage.begin("web1", &["--downtime-limit", "5s"]);
    tap.wait();
    order
}

fn journal(stage: &Stage, id: HostId) -> PathBuf {
    stage.rig.lab().host(id).directory().join("journal/handover.jsonl")
}

/// Takes away a journal, and what tells that there was one: without that the daemon would not start.
fn lose_journal(stage: &Stage, id: HostId) {
    let file = journal(stage, id);
    std::fs::remove_file(file.with_file_name("handover.id")).unwrap();
    std::fs::remove_file(file).unwrap();
}

/// Waits until a daemon does not know whose web1 is, and says so.
fn wait_for_doubt(stage: &Stage, id: HostId) -> Migration {
    let in_doubt = |migration: &Migration| migration.in_doubt_since_unix_seconds.is_some();
    let migration = stage.wait_until(id, "web1", "the doubt", in_doubt);
    assert!(migration.waits_for.is_some() && migration.guest_runs_at.is_none(), "{migration:?}");
    migration
}

fn resolve(stage: &Stage, id: HostId, more: &[&str]) -> CtlOutput {
    stage.rig.ctl(id, &[&["resolve", "web1"], more].concat()).unwrap()
}

const RUN_HERE: [&str; 3] = ["--run-here", "--other-host-is-off", "--yes"];

#[test]
fn a_source_without_its_journal_asks_before_it_resumes() {
    let test = "a_source_without_its_journal_asks_before_it_resumes";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    // The guest runs there already, or could be told to; and the source has forgotten all of it.
    for word in [Message::Running, Message::Commit] {
        eprintln!("{word:?}");
        let mut guest = stage.guest("web1");
        let mut there = stage.receiver("web1");
        let from = if word == Message::Commit { HostId::A } else { HostId::B };
        let order = begin(&stage, &tap, from, word);
        stage.rig.stop_daemon(HostId::A).unwrap();
        lose_journal(&stage, HostId::A);
        tap.lose();
        stage.rig.start_daemon(HostId::A).unwrap();
        order.expect(6, &["memlaned"]);
        if word == Message::Running {
            wait_for_exit(guest.process());
            assert_runs(&mut there);
            let ended = stage.wait_until(HostId::A, "web1", "the end", |it| it.outcome.is_some());
            assert_eq!(ended.outcome, Some(Outcome::Completed), "{ended:?}");
            there.quit().unwrap();
        } else {
            wait_for_exit(there.process());
            stage.assert_runs_on("web1", &mut guest);
            guest.quit().unwrap();
        }
    }
}

#[test]
fn a_destination_without_its_journal_asks_before_it_discards() {
    let test = "a_destination_without_its_journal_asks_before_it_discards";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = begin(&stage, &tap, HostId::A, Message::Commit);
    stage.rig.stop_daemon(HostId::B).unwrap();
    lose_journal(&stage, HostId::B);
    tap.lose();
    stage.rig.start_daemon(HostId::B).unwrap();
    order.expect(0, &[]);
    assert_runs(&mut there);
    wait_for_exit(guest.process());
}

#[test]
fn the_source_burns_and_an_operator_has_the_guest_run() {
    let test = "the_source_burns_and_an_operator_has_the_guest_run";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = begin(&stage, &tap, HostId::B, Message::Ready);
    let too_early = resolve(&stage, HostId::B, &RUN_HERE);
    assert_eq!(too_early.code, 3, "{}", too_early.text);
    assert!(too_early.text.contains("not in doubt"), "{}", too_early.text);
    stage.rig.stop_daemon(HostId::A).unwrap();
    guest.process().kill().unwrap();
    tap.lose();
    order.expect(6, &["memlaned"]);
    let doubt = wait_for_doubt(&stage, HostId::B);
    // It is so after a restart too.
    stage.rig.start_daemon(HostId::B).unwrap();
    assert_eq!(wait_for_doubt(&stage, HostId::B).id, doubt.id);
    let status = stage.rig.ctl_command(HostId::B, &["status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("in doubt for") && status.contains("waits for host-a"), "{status}");
    let metrics = stage.rig.metrics(HostId::B).unwrap();
    assert!(metrics.contains("\nmemlane_migrations_in_doubt 1\n"), "{metrics}");

    for (words, why) in [
        (&["--run-here", "--yes"][..], "--other-host-is-off"),
        (&["--other-host-is-off", "--yes"], "--discard"),
        (&["--run-here", "--discard", "--other-host-is-off", "--yes"], "cannot be used with"),
        (&RUN_HERE[..2], "--yes"),
    ] {
        let refused = resolve(&stage, HostId::B, words);
        assert_eq!(refused.code, 2, "{}", refused.text);
        assert!(refused.text.contains(why), "{}", refused.text);
    }
    let resolved = resolve(&stage, HostId::B, &RUN_HERE);
    assert_eq!(resolved.code, 0, "{}", resolved.text);
    stage.wait_for_standing(HostId::B, "web1", "running");
    assert_runs(&mut there);
    stage.rig.start_daemon(HostId::B).unwrap();
    stage.wait_for_standing(HostId::B, "web1", "running");
    assert_runs(&mut there);
    // The source is found again after all, and hears that its guest has gone.
    stage.rig.start_daemon(HostId::A).unwrap();
    stage.wait_for_end("web1");
    assert_runs(&mut there);
}

#[test]
fn the_destination_burns_and_an_operator_takes_the_guest_back() {
    let test = "the_destination_burns_and_an_operator_takes_the_guest_back";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    for discard in [false, true] {
        let mut guest = stage.guest("web1");
        let mut there = stage.receiver("web1");
        let order = begin(&stage, &tap, HostId::A, Message::Commit);
        stage.rig.stop_daemon(HostId::B).unwrap();
        there.process().kill().unwrap();
        tap.lose();
        wait_for_doubt(&stage, HostId::A);
        let words: &[&str] = if discard { &["--discard", "--yes"] } else { &RUN_HERE };
        let resolved = resolve(&stage, HostId::A, words);
        assert_eq!(resolved.code, 0, "{}", resolved.text);
        let answer = order.expect(4, &["the operator"]);
        stage.wait_for_log(HostId::A, "an operator decides about a guest in doubt");
        if discard {
            assert!(answer.last().unwrap()["guest_runs_at"].is_null(), "{}", answer.text);
            wait_for_exit(guest.process());
        } else {
            stage.assert_runs_on("web1", &mut guest);
            stage.rig.start_daemon(HostId::A).unwrap();
            stage.assert_runs_on("web1", &mut guest);
        }
        // What comes back finds that it was decided otherwise.
        stage.rig.start_daemon(HostId::B).unwrap();
        stage.wait_until(HostId::B, "web1", "the end", |migration| migration.outcome.is_some());
        if !discard {
            stage.assert_runs_on("web1", &mut guest);
            guest.quit().unwrap();
        }
    }
}

#[test]
fn a_source_that_restarts_after_the_end_says_that_it_went_well() {
    let test = "a_source_that_restarts_after_the_end_says_that_it_went_well";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = begin(&stage, &tap, HostId::B, Message::Running);
    // It does not hear that it is to be discarded.
    signal(guest.process(), Signal::STOP);
    tap.release();
    let file = journal(&stage, HostId::A);
    let finished =
        || std::fs::read(&file).is_ok_and(|text| String::from_utf8_lossy(&text).contains("finished"));
    wait_for("the record", LONG, || finished().then_some(())).unwrap();
    stage.rig.stop_daemon(HostId::A).unwrap();
    order.expect(6, &["memlaned"]);
    stage.rig.start_daemon(HostId::A).unwrap();
    let ended = stage.wait_until(HostId::A, "web1", "the end", |migration| migration.outcome.is_some());
    assert_eq!(ended.outcome, Some(Outcome::Completed), "{ended:?}");
    assert_eq!(ended.guest_runs_at.as_deref(), Some("host-b"));
    assert_eq!(stage.rig.ctl(HostId::A, &["watch", "web1"]).unwrap().code, 0);
    signal(guest.process(), Signal::CONT);
    wait_for_exit(guest.process());
    assert_runs(&mut there);
}

/// A VMM spoken by hand: it does as it is told, and runs nothing.
struct Raw(OwnedFd);

impl Raw {
    /// Attaches a guest, and waits for the welcome.
    fn attach(
        stage: &Stage,
        id: HostId,
        shape: &GuestShape,
        ram: &GuestRam,
        hello: (RunState, Option<Bond>),
    ) -> Self {
        let path = stage.rig.lab().host(id).directory().join("attach.sock");
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let (oldest, newest) = VERSIONS;
        let (run_state, bond) = hello;
        let shape = GuestShape { regions: ram.regions().to_vec(), ..shape.clone() };
        let hello = FromVmm::Hello(VmmHello { oldest, newest, run_state, bond, shape });
        packet::send(&socket, &hello.encode(), &ram.descriptors()).unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(3)),
        )
        .unwrap();
        let raw = Self(socket);
        assert!(matches!(raw.receive(), Some(ToVmm::Welcome { .. })));
        raw
    }

    /// The next packet; `None` at the end of the connection, or if nothing comes for a while.
    fn receive(&self) -> Option<ToVmm> {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        match packet::recv(&self.0, &mut buffer) {
            Ok((0, _)) | Err(_) => None,
            Ok((length, _)) => Some(ToVmm::decode(&buffer[..length]).unwrap()),
        }
    }

    fn answer(&self, id: u32) {
        let reply = FromVmm::Reply(Reply { id, outcome: Ok([0; 2]) });
        packet::send(&self.0, &reply.encode(), &[]).unwrap();
    }

    /// Does as it is told until it is to resume or end, and returns that with what it was bound to.
    fn serve(&self) -> (u32, Request, Option<Bond>) {
        let mut bond = None;
        wait_for("a request to resume", LONG, || {
            let ToVmm::Request { id, request } = self.receive()? else { panic!("welcomed twice") };
            if matches!(request, Request::Resume | Request::Discard) {
                return Some((id, request, bond.take()));
            }
            if let Request::Prepare(prepared) = request {
                bond = Some(prepared);
            }
            self.answer(id);
            None
        })
        .unwrap()
    }
}

fn memory(shape: &GuestShape) -> GuestRam {
    let layout: Vec<(u64, u64)> = shape.regions.iter().map(|region| (region.address, region.bytes)).collect();
    GuestRam::create(&layout, &Backing::Memfd).unwrap()
}

/// Of two guests in one process, one loses its connection as it is told to run.
#[test]
fn the_guest_of_a_neighbour_in_the_same_process_is_not_resumed() {
    let test = "the_guest_of_a_neighbour_in_the_same_process_is_not_resumed";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let waiting = stage.receiver("web1");
    assert_eq!(stage.rig.ctl(HostId::A, &["check", "web1", "host-b"]).unwrap().code, 0);
    let shape = tap.offer().unwrap().shape;
    waiting.quit().unwrap();
    wait_for("the name to be free", LONG, || {
        stage.rig.guest(HostId::B, "web1").ok()?.is_none().then_some(())
    })
    .unwrap();

    let ram = memory(&shape);
    let vmm = Raw::attach(&stage, HostId::B, &shape, &ram, (RunState::Incoming, None));
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    let order = stage.begin("web1", &["--downtime-limit", "5s"]);
    let (_, request, bond) = vmm.serve();
    assert_eq!(request, Request::Resume);
    let bond = bond.expect("it was prepared first");
    assert_eq!((bond.peer.as_str(), bond.fetching), ("host-a", false));
    drop(vmm);

    let neighbour_shape = GuestShape { name: "web2".parse().unwrap(), ..shape.clone() };
    let neighbour_ram = memory(&shape);
    let attach = |shape, ram, run_state, bond| Raw::attach(&stage, HostId::B, shape, ram, (run_state, bond));
    // As itself, and in the name of the migration.
    for (shape, run_state, bond) in [
        (&neighbour_shape, RunState::Running, None),
        (&neighbour_shape, RunState::Loaded, Some(bond.clone())),
        (&shape, RunState::Relinquished, Some(bond.clone())),
    ] {
        let neighbour = attach(shape, &neighbour_ram, run_state, bond);
        assert_eq!(neighbour.receive(), None, "{} is told something", shape.name);
    }
    let back = attach(&shape, &ram, RunState::Loaded, Some(bond));
    let (id, request, _) = back.serve();
    assert_eq!(request, Request::Resume);
    back.answer(id);
    order.expect(0, &[]);
    wait_for_exit(guest.process());
    stage.wait_for_log(HostId::B, "it has another guest");
}

/// Another process names the migration while the VMM that belongs to it is away.
#[test]
fn a_stranger_that_names_a_migration_is_sent_away() {
    let test = "a_stranger_that_names_a_migration_is_sent_away";
    let Some((mut stage, tap)) = Stage::tapped(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let order = begin(&stage, &tap, HostId::A, Message::Commit);
    let offer = tap.offer().unwrap();
    signal(there.process(), Signal::STOP);
    stage.rig.start_daemon(HostId::B).unwrap();
    let ram = memory(&offer.shape);
    let bond = Bond { migration: offer.migration, peer: "host-a".parse().unwrap(), fetching: false };
    for run_state in [RunState::Loaded, RunState::Running, RunState::Incoming] {
        let bond = (run_state == RunState::Loaded).then(|| bond.clone());
        let stranger = Raw::attach(&stage, HostId::B, &offer.shape, &ram, (run_state, bond));
        assert_eq!(stranger.receive(), None, "{run_state:?} is told something");
    }
    stage.wait_for_log(HostId::B, "it is another process");
    signal(there.process(), Signal::CONT);
    tap.lose();
    order.expect(0, &[]);
    assert_runs(&mut there);
    wait_for_exit(guest.process());
}
