//! A source that breaks the protocol of post-copy: it is dropped, no page of it is placed, and the next
//! migration succeeds.

mod common;

use std::io::Write;
use std::net::Shutdown;

use common::{GUEST, Peer, Stage, captured, lane, offered, ours, words};
use memlane_lab::{HostId, LabOptions};
use memlane_protocol::wire::control::{Accept, Control, Missing};
use memlane_protocol::wire::frame::{Content, Run, encode_head};

/// Offers over a connection of its own to serve the migration that was offered.
fn serving(stage: &Stage) -> (Peer, Accept) {
    let mut peer = Peer::call(stage);
    peer.send(&Control::Fetch(ours()));
    match peer.receive() {
        Control::Accept(accept) => (peer, accept),
        other => panic!("the offer to serve is answered with {other:?}"),
    }
}

fn missing(first: u64, word: u64) -> Control {
    Control::Missing(Missing { first, words: vec![word], last: true })
}

#[test]
fn a_source_that_serves_badly() {
    let Some(mut stage) = Stage::insecure("a_source_that_serves_badly", LabOptions::default()) else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let offer = captured(&mut stage);
    let pages: u64 = offer.shape.regions.iter().map(|region| region.bytes).sum::<u64>() / 4096;

    // Nobody fetches anything.
    let mut peer = Peer::call(&stage);
    peer.send(&Control::Fetch(ours()));
    peer.wait_for_hang_up();

    // What is missing is told before there is anybody to serve it.
    let (mut peer, _) = offered(&stage, &offer);
    peer.send(&missing(0, 1));
    peer.wait_for_hang_up();
    stage.wait_for_end_of_ours("before it offers to serve it");
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    // Pages that there are not.
    for (first, word) in [(pages, 1), (u64::MAX - 63, u64::MAX)] {
        let (mut peer, _) = offered(&stage, &offer);
        let (_serving, _) = serving(&stage);
        peer.send(&missing(first, word));
        peer.wait_for_hang_up();
        stage.wait_for_end_of_ours("is missing");
        stage.wait_for_standing(HostId::B, "web1", "incoming");
    }

    // Pages before it is known which are missing, and words that do not belong there: each time the
    // source may begin anew.
    let (mut peer, _) = offered(&stage, &offer);
    let (serving_well, accept) = serving(&stage);
    let mut lane = lane(&stage, &accept, 0);
    let mut frame = Vec::new();
    encode_head(&mut frame, 1, &[Run { pages: 3..4, content: Content::Zero }], None);
    lane.0.write_all(&frame).unwrap();
    lane.wait_for_hang_up();
    stage.wait_for_log(HostId::B, "pages came before it was known which are missing");
    serving_well.stream.shutdown(Shutdown::Both).unwrap();
    let (mut serving_badly, _) = serving(&stage);
    serving_badly.send(&Control::HolesDone);
    serving_badly.wait_for_hang_up();
    let (_serving_again, _) = serving(&stage);
    peer.send(&missing(0, u64::MAX));
    assert_eq!(peer.receive(), Control::MissingDone);
    peer.stream.shutdown(Shutdown::Both).unwrap();
    stage.wait_for_end_of_ours("closed the control connection");
    stage.wait_for_standing(HostId::B, "web1", "incoming");

    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
    let mut back = stage.rig.start_vmm(HostId::A, "web1", &words(&format!("{GUEST} --incoming"))).unwrap();
    let answer = stage.rig.ctl(HostId::B, &["migrate", "web1", "host-a", "--postcopy", "now"]).unwrap();
    assert_eq!(answer.code, 0, "{}", answer.text);
    common::assert_runs(&mut back);
}
