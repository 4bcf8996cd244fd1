//! A peer that breaks the protocol is dropped, whatever it does, and nothing is lost by it: the
//! daemon goes on, the VMM that waits goes on waiting, and the next migration succeeds.

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;

use common::{
    LONG, Lane, Peer, Stage, captured, connect, greet, hello, host_a, lane, lane_address, offered, ours,
    welcome,
};
use memlane_lab::{HostId, LabOptions};
use memlane_net::config::{CONTROL_PORT, LANE_PORT};
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::{Accept, Control, Offer, Port};
use memlane_protocol::wire::frame::{
    Ack, Content, FRAME_HEADER_BYTES, Run, encode_compressed_head, encode_head,
};
use memlane_protocol::wire::hello::{Answer, Purpose, VERSIONS};

const PAGE: usize = 4096;
/// Where the destination that a test plays awaits control connections, and lanes.
const FAKE_PORTS: [u16; 2] = [7600, 7601];

#[test]
fn versions_and_names() {
    let Some(mut stage) = Stage::insecure("versions_and_names", LabOptions::default()) else { return };
    let answer_to = |port: u16, change: &dyn Fn(&mut memlane_protocol::wire::hello::Hello)| {
        let mut hello = hello(host_a(), if port == CONTROL_PORT { Purpose::Control } else { Purpose::Probe });
        change(&mut hello);
        greet(&mut connect(&stage, port), &hello).unwrap()
    };
    for port in [CONTROL_PORT, LANE_PORT] {
        let versions =
            |oldest, newest| answer_to(port, &|hello| (hello.oldest, hello.newest) = (oldest, newest));
        let (oldest, newest) = VERSIONS;
        assert_eq!(versions(oldest, 9), Answer::Welcome { version: newest });
        let Answer::Refused { reason } = versions(9, 9) else { panic!("version 9 is welcome") };
        let ours = format!("this host speaks versions {oldest} to {newest}");
        for part in [ours.as_str(), "host-a speaks 9 to 9", "upgrade the older one"] {
            assert!(reason.contains(part), "{reason}");
        }
    }

    let stranger = answer_to(CONTROL_PORT, &|hello| hello.host = "host-x".parse().unwrap());
    let Answer::Refused { reason } = stranger else { panic!("a stranger is welcome") };
    assert!(reason.contains("host-x is no peer of host-b") && reason.contains("[[peer]]"), "{reason}");

    // From the address of another port than host B knows it at: it is not even heard.
    let [a, b] = [HostId::A, HostId::B].map(|id| stage.rig.lab().host(id));
    let control = SocketAddr::new(IpAddr::V4(b.control_address()), CONTROL_PORT);
    let elsewhere = a.ports()[0].address;
    let mut stream = a
        .run_in(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from((elsewhere, 0)).into()).unwrap();
            socket.connect(&control.into()).map(|()| TcpStream::from(socket)).unwrap()
        })
        .unwrap();
    greet(&mut stream, &hello(host_a(), Purpose::Control)).unwrap_err();

    // Through the wrong door, and with a token that nobody gave.
    let lane = Purpose::Lane { token: [7; 16], lane: 0 };
    for (port, purpose, why) in [
        (CONTROL_PORT, lane, "this is the control port"),
        (LANE_PORT, Purpose::Control, "this is a port for lanes"),
        (LANE_PORT, lane, "no migration here awaits this lane"),
    ] {
        let answer = answer_to(port, &|hello| hello.purpose = purpose);
        let Answer::Refused { reason } = answer else { panic!("{purpose:?} is welcome") };
        assert!(reason.contains(why), "{reason}");
    }
    stage.wait_for_log(HostId::B, "the address is that of no peer");
    assert!(stage.log(HostId::B).contains(&format!("address={elsewhere}")));
}

#[test]
fn nonsense_on_the_control_port() {
    let Some(mut stage) = Stage::insecure("nonsense_on_the_control_port", LabOptions::default()) else {
        return;
    };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");

    // Instead of a greeting; `true`: and then it hangs up.
    let greeting = hello(host_a(), Purpose::Control).encode();
    let beginnings: [(&[u8], bool); 5] = [
        (b"GET / HTTP/1.1\r\nHost: host-b\r\nUser-Agent: something that is quite lost here\r\n\r\n\r\n\r\n", false),
        (&[0xff; 4096], false),
        (&greeting[..greeting.len() / 2], true),
        (&greeting[..greeting.len() / 2], false),
        (b"", false),
    ];
    for port in [CONTROL_PORT, LANE_PORT] {
        let streams: Vec<_> = beginnings
            .iter()
            .map(|(bytes, hangs_up)| {
                let mut stream = connect(&stage, port);
                stream.write_all(bytes).unwrap();
                if *hangs_up {
                    stream.shutdown(Shutdown::Write).unwrap();
                }
                stream
            })
            .collect();
        for stream in streams {
            Lane(stream).wait_for_hang_up();
        }
    }

    // Instead of an offer: an unknown kind, an oversize length, half a message, words out of turn.
    let header = |kind: u16, bytes: u32| {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 2]);
        header.extend(bytes.to_le_bytes());
        header
    };
    assert_eq!(Control::Ping(0).encode()[..8], header(4, 8), "the header is no longer what it was");
    let half = Control::Iteration { number: 1, pages: 1 }.encode();
    let state = Control::State { total: 4, offset: 2, bytes: vec![1, 2] }.encode();
    let mut garbled = state.clone();
    *garbled.last_mut().unwrap() ^= 1;
    let messages = [
        header(999, 0),
        header(1, u32::MAX),
        [header(1, 64), vec![0xee; 64]].concat(),
        half[..half.len() - 3].to_vec(),
        header(1, 1 << 20),
        garbled,
        Control::Verify.encode(),
        Vec::new(),
    ];
    let peers: Vec<_> = messages
        .iter()
        .map(|bytes| {
            let mut peer = Peer::call(&stage);
            peer.fall_silent();
            peer.stream.write_all(bytes).unwrap();
            peer
        })
        .collect();
    peers.iter().for_each(Peer::wait_for_hang_up);
    for why in
        ["unknown control message 999", "length of a control message is 4294967295", "not answered for"]
    {
        stage.wait_for_log(HostId::B, why);
    }

    // After an offer that was accepted.
    let offer = captured(&mut stage);
    let pages: u64 = offer.shape.regions.iter().map(|region| region.bytes).sum::<u64>() / PAGE as u64;
    let holes = |first: u64, end: u64| Control::Holes(std::iter::once(first..end).collect());
    let too_late = Control::State { total: 4, offset: 2, bytes: vec![1, 2] };
    for (bytes, why) in [
        (holes(0, pages + 1).encode(), "the source sent the hole"),
        (holes(5, 5).encode(), "the source sent the hole"),
        (holes(u64::MAX, 3).encode(), "the source sent the hole"),
        (too_late.encode(), "state from byte 2 came where byte 0 is next"),
        (Control::HolesDone.encode(), "sent `holes done` out of turn"),
        (Control::Offer(offer.clone()).encode(), "sent `offer` out of turn"),
        (header(0, 0), "unknown control message 0"),
        (half[..half.len() - 3].to_vec(), "closed the control connection"),
    ] {
        let (mut peer, _) = offered(&stage, &offer);
        peer.stream.write_all(&bytes).unwrap();
        if why.starts_with("closed") {
            peer.stream.shutdown(Shutdown::Write).unwrap();
        }
        peer.wait_for_hang_up();
        stage.wait_for_end_of_ours(why);
        stage.wait_for_standing(HostId::B, "web1", "incoming");
    }
    // Commits what is not there: nothing may run.
    let (mut peer, _) = offered(&stage, &offer);
    let (migration, nanoseconds, reason) = (ours(), 0, String::new());
    peer.send(&Control::Handover { migration, message: Message::Commit, nanoseconds, reason });
    peer.send(&Control::HolesDone);
    peer.wait_for_hang_up();
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    // Says nothing more.
    let (peer, _) = offered(&stage, &offer);
    peer.fall_silent();
    peer.wait_for_hang_up();
    stage.wait_for_end_of_ours("has not answered for");

    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

#[test]
fn nonsense_on_a_lane() {
    let Some(mut stage) = Stage::insecure("nonsense_on_a_lane", LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let offer = captured(&mut stage);
    let pages: u64 = offer.shape.regions.iter().map(|region| region.bytes).sum::<u64>() / PAGE as u64;

    let frame = |sequence: u64, run: Run, checksum: Option<u32>| {
        let mut bytes = Vec::new();
        let payload = encode_head(&mut bytes, sequence, &[run], checksum);
        bytes.resize(bytes.len() + payload as usize, 0x5a);
        bytes
    };
    let data = |pages| Run { pages, content: Content::Data };
    let good = frame(1, data(3..5), None);
    let patched = |at: usize, with: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let zeros = |pages| Run { pages, content: Content::Zero };
    // An LZ4 block of so many pages, in a frame of pages 3 and 4.
    let compressed = |pages_in_it: usize, checksum: Option<u32>| {
        let block = lz4_flex::block::compress(&vec![0x5a; pages_in_it * PAGE]);
        let mut bytes = Vec::new();
        encode_compressed_head(&mut bytes, 1, &[data(3..5)], checksum, block.len() as u64);
        [bytes, block].concat()
    };
    let garbage = {
        let mut bytes = Vec::new();
        encode_compressed_head(&mut bytes, 1, &[data(3..5)], None, 100);
        [bytes, vec![0xff; 100]].concat()
    };
    let mut not_shorter = good.clone();
    not_shorter[6..8].copy_from_slice(&2u16.to_le_bytes());
    // The layout of a frame's header: magic, runs, flags, sequence, payload; of a run: first, pages, content.
    let bad = [
        (patched(0, b"XXXX"), "wrong magic"),
        (patched(4, &u16::MAX.to_le_bytes()), "number of runs in a frame is 65535"),
        (patched(6, &0x80u16.to_le_bytes()), "unknown frame flags"),
        (patched(16, &u32::MAX.to_le_bytes()), "length of a frame is 4294967295"),
        (patched(16, &(PAGE as u32).to_le_bytes()), "the length of a frame with these runs cannot be 4096"),
        (patched(FRAME_HEADER_BYTES + 8, &0u32.to_le_bytes()), "the length of a run in pages cannot be 0"),
        (patched(FRAME_HEADER_BYTES + 8, &u32::MAX.to_le_bytes()), "length of a run in pages is 4294967295"),
        (patched(FRAME_HEADER_BYTES + 12, &77u32.to_le_bytes()), "unknown content of a run 77"),
        (patched(FRAME_HEADER_BYTES, &u64::MAX.to_le_bytes()), "end of a run of pages"),
        (frame(1, data(pages - 1..pages + 1), None), "end of a run of pages"),
        (frame(1, zeros(pages - 1..pages + 1), None), "end of a run of pages"),
        (frame(2, data(3..5), None), "frame 2 where 1 is next"),
        (frame(0, data(3..5), None), "frame 0 where 1 is next"),
        ([good.clone(), good.clone()].concat(), "frame 1 where 2 is next"),
        (frame(1, data(3..5), Some(1)), "checksum of the frame"),
        (garbage, "a frame cannot be decompressed"),
        (compressed(100, None), "a frame cannot be decompressed"),
        (compressed(1, None), "the length of the pages in a compressed frame cannot be 4096"),
        (not_shorter, "the length of a frame with these runs cannot be 8192"),
        (compressed(2, Some(1)), "checksum of the frame is 0x00000001"),
    ];
    let (peer, accept) = offered(&stage, &offer);
    for (number, (bytes, why)) in (0..).zip(&bad) {
        let mut lane = lane(&stage, &accept, number);
        // It may have hung up before it has read all of that.
        let _ = lane.0.write_all(bytes);
        lane.wait_for_hang_up();
        stage.wait_for_log(HostId::B, why);
    }

    // Half a frame: then the end, and then nothing more, which the source's silence would end.
    let mut half = lane(&stage, &accept, 100);
    half.0.write_all(&good[..good.len() - 1]).unwrap();
    half.0.shutdown(Shutdown::Write).unwrap();
    half.wait_for_hang_up();
    let mut stuck = lane(&stage, &accept, 101);
    stuck.0.write_all(&good[..good.len() - 1]).unwrap();
    // A lane that nothing is wrong with is acknowledged meanwhile.
    let mut fine = lane(&stage, &accept, 102);
    fine.0.write_all(&good).unwrap();
    let mut ack = [0; memlane_protocol::wire::frame::ACK_BYTES];
    fine.0.read_exact(&mut ack).unwrap();
    assert_eq!(Ack::decode(&ack).unwrap(), Ack { sequence: 1 });
    peer.fall_silent();
    peer.wait_for_hang_up();
    for lane in [stuck, fine] {
        lane.wait_for_hang_up();
    }
    stage.wait_for_end_of_ours("has not answered for");
    // The token is worth nothing any more.
    let again = hello(host_a(), Purpose::Lane { token: accept.token, lane: 0 });
    let answer = greet(&mut connect(&stage, LANE_PORT), &again).unwrap();
    assert!(matches!(answer, Answer::Refused { .. }), "{answer:?}");

    // More lanes than anybody needs.
    let (mut peer2, accept) = offered(&stage, &offer);
    let lanes: Vec<_> = (0..40).map(|number| lane(&stage, &accept, number)).collect();
    let (migration, nanoseconds, reason) = (ours(), 0, "had enough".to_owned());
    peer2.send(&Control::Handover { migration, message: Message::Abort, nanoseconds, reason });
    stage.wait_for_end_of_ours("had enough");
    lanes.into_iter().for_each(Lane::wait_for_hang_up);

    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}

/// What a destination does to its source.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trick {
    NoAnswer,
    WrongAnswer,
    HangsUp,
    Silence,
    NoAcks,
    AcksTooMuch,
    AcksNonsense,
    ClosesLanes,
    OutOfTurn,
    FloodOfAnswers,
    ReadyTooEarly,
}

#[test]
fn a_destination_that_breaks_the_protocol() {
    let test = "a_destination_that_breaks_the_protocol";
    let Some(mut stage) = Stage::insecure(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let b = stage.rig.lab().host(HostId::B).control_address();
    let (real, fake) = (format!("control = \"{b}\""), format!("control = \"{b}:{}\"", FAKE_PORTS[0]));
    stage.reconfigure(HostId::A, |text| text.replace(&real, &fake));
    stage.wait_for_standing(HostId::A, "web1", "running");

    let destination = FakeDestination::listen(&stage);
    for (trick, code, why) in [
        (Trick::NoAnswer, 3, "has not answered"),
        (Trick::WrongAnswer, 3, "answered the offer with `round`"),
        (Trick::HangsUp, 4, "closed the control connection"),
        // By the control connection or by the lane, whichever is noticed first.
        (Trick::Silence, 4, "host-a"),
        (
            Trick::NoAcks,
            4,
            "lane to the destination is lost, the last one because the other end has not answered for",
        ),
        (Trick::AcksTooMuch, 4, "the other end broke the protocol"),
        (Trick::AcksNonsense, 4, "the other end broke the protocol"),
        (Trick::ClosesLanes, 4, "the last one because the other end closed the connection"),
        (Trick::OutOfTurn, 4, "sent `verify` out of turn"),
        (Trick::FloodOfAnswers, 4, "host"),
        (Trick::ReadyTooEarly, 4, "gave up: enough"),
    ] {
        eprintln!("{trick:?}");
        let order = stage.begin("web1", &["--downtime-limit", "30s", "--patience", "0s"]);
        let held = destination.play(trick);
        order.expect(code, &[why]);
        drop(held);
        stage.assert_runs_on("web1", &mut guest);
    }

    stage.reconfigure(HostId::A, |text| text.replace(&fake, &real));
    let mut there = stage.receiver("web1");
    stage.assert_moves("web1", &mut there);
}

/// A destination that a test plays on host B, beside the daemon there.
struct FakeDestination {
    control: TcpListener,
    lanes: mpsc::Receiver<TcpStream>,
    lane_address: SocketAddr,
}

impl FakeDestination {
    fn listen(stage: &Stage) -> Self {
        let host = stage.rig.lab().host(HostId::B);
        let lane_address = SocketAddr::new(lane_address(stage).ip(), FAKE_PORTS[1]);
        let bind = || {
            let control = TcpListener::bind((host.control_address(), FAKE_PORTS[0])).unwrap();
            (control, TcpListener::bind(lane_address).unwrap())
        };
        let (control, listener) = host.run_in(bind).unwrap();
        let (sender, lanes) = mpsc::channel();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let hello = welcome(&mut stream);
                let is_lane = hello.is_ok_and(|hello| matches!(hello.purpose, Purpose::Lane { .. }));
                if is_lane && sender.send(stream).is_err() {
                    break;
                }
            }
        });
        Self { control, lanes, lane_address }
    }

    /// Waits for an order and plays a trick on it; what is returned is to be kept until it ends.
    fn play(&self, trick: Trick) -> (Peer, Vec<TcpStream>) {
        let (mut peer, offer) = loop {
            let (mut stream, _) = self.control.accept().unwrap();
            if welcome(&mut stream).is_err() {
                continue;
            }
            let peer = Peer::over(stream);
            // There are also words about the migration before, on connections of their own.
            if let Some(Control::Offer(offer)) = peer.hear() {
                break (peer, offer);
            }
        };
        // Of the migration before, which had opened it again.
        while self.lanes.try_recv().is_ok() {}
        match trick {
            Trick::NoAnswer => {
                peer.fall_silent();
                return (peer, Vec::new());
            }
            Trick::WrongAnswer => {
                peer.send(&Control::Iteration { number: 1, pages: 1 });
                return (peer, Vec::new());
            }
            _ => {}
        }
        let name = "port0".parse().unwrap();
        let ports = vec![Port { name, address: self.lane_address, lanes: 1 }];
        peer.send(&Control::Accept(Accept { token: [3; 16], ports }));
        let mut lane = self.lanes.recv_timeout(LONG).unwrap();
        let mut word = |message, why: &str| {
            let (migration, nanoseconds, reason) = (offer.migration, 0, why.to_owned());
            peer.send(&Control::Handover { migration, message, nanoseconds, reason });
        };
        match trick {
            Trick::HangsUp => peer.stream.shutdown(Shutdown::Both).unwrap(),
            Trick::Silence => peer.fall_silent(),
            Trick::AcksTooMuch => lane.write_all(&Ack { sequence: 1 << 40 }.encode()).unwrap(),
            Trick::AcksNonsense => lane.write_all(&[0x42; 64]).unwrap(),
            Trick::ClosesLanes => lane.shutdown(Shutdown::Both).unwrap(),
            Trick::OutOfTurn => peer.send(&Control::Verify),
            Trick::FloodOfAnswers => {
                // The source hangs up at some point, or lets it be and waits for acknowledgements.
                let flood = Control::HolesDone.encode().repeat(1000);
                let _ = peer.stream.write_all(&flood);
            }
            Trick::ReadyTooEarly => {
                word(Message::Running, "");
                word(Message::Ready, "");
                word(Message::Done, "");
                word(Message::Abort, "enough");
            }
            Trick::NoAnswer | Trick::WrongAnswer | Trick::NoAcks => {}
        }
        (peer, vec![lane])
    }
}

/// A migration is offered once, and nobody else's connection changes it.
#[test]
fn an_offer_that_names_a_known_migration_is_refused() {
    let test = "an_offer_that_names_a_known_migration_is_refused";
    let Some(mut stage) = Stage::insecure(test, LabOptions::default()) else { return };
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    let offer = captured(&mut stage);
    let (peer, _) = offered(&stage, &offer);
    let again = Offer { migration: ours(), ..offer };
    let refused = || {
        let mut other = Peer::call(&stage);
        other.send(&Control::Offer(again.clone()));
        let Control::Refuse(refusals) = other.receive() else { panic!("it is not refused") };
        assert!(refusals[0].reason.contains("already"), "{refusals:?}");
        other.wait_for_hang_up();
    };
    // Under way, and after its end.
    refused();
    stage.wait_for_standing(HostId::B, "web1", "incoming");
    let migrations = stage.rig.ctl(HostId::B, &["status"]).unwrap();
    assert_eq!(migrations.last().unwrap()["migrations"], 1, "{}", migrations.text);
    peer.fall_silent();
    peer.wait_for_hang_up();
    refused();
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
}
