//! Greetings, nonsense, refusals, and a daemon that does not run.

use std::os::fd::AsFd;
use std::path::PathBuf;

use memlane_protocol::wire::attach::{MAX_PACKET_BYTES, Request, RunState, ToVmm, VERSIONS};

use super::*;
use crate::packet;

#[test]
fn connections_with_nonsense_are_dropped_and_tried_again() {
    let bench = Bench::new(RunState::Running);
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

#[test]
fn a_refusal_is_final_where_the_caller_says_so() {
    let mut bench = Bench::with(RunState::Running, true);
    let (daemon, _) = bench.accept();
    daemon.send(&ToVmm::Refused { reason: "no room".into() }, &[]);
    assert!(matches!(bench.ended(), Ended::Refused(reason) if reason == "no room"));
}

#[test]
fn no_daemon_is_no_error_but_a_wrong_standing_is() {
    let vmm = Bench::new(RunState::Running).vmm.clone();
    let options = |run_state| Options {
        socket: PathBuf::from("/nonexistent/attach.sock"),
        run_state,
        refusal_is_final: true,
    };
    let attachment = serve(options(RunState::Running), vmm.clone()).unwrap();
    assert!(!attachment.is_finished());
    drop(attachment);
    assert!(serve(options(RunState::Loaded), vmm).is_err());
}
