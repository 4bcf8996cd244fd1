//! What one daemon says to another.

use lz4_flex::block::compress;
use memlane_protocol::handover::Message;
use memlane_protocol::wire::control::{
    Accept, Control, FetchReport, Missing, Offer, Port, QemuGuest, Refusal, RefusalKind,
};
use memlane_protocol::wire::frame::{Ack, Content, PageRequest, Run, encode_compressed_head, encode_head};
use memlane_protocol::wire::hello::{Answer, Hello, Purpose, VERSIONS};
use memlane_protocol::wire::machine::{CpuidEntry, GuestShape, Machine, Nic, Region, TrackerKind};

use super::{Seeds, named};

const ID: [u8; 16] = *b"0123456789abcdef";
const PAGE: usize = 4096;

pub(super) fn hello() -> Seeds {
    let hello = |purpose| {
        let (oldest, newest) = VERSIONS;
        Hello { oldest, newest, host: "host-a".parse().unwrap(), purpose }.encode()
    };
    named([
        ("control", hello(Purpose::Control)),
        ("lane", hello(Purpose::Lane { token: ID, lane: 3 })),
        ("faults", hello(Purpose::Faults { token: ID })),
        ("state-lane", hello(Purpose::State { token: ID, lane: 7 })),
        ("probe", hello(Purpose::Probe)),
        ("welcome", Answer::Welcome { version: VERSIONS.1 }.encode()),
        ("refused", Answer::Refused { reason: "host-a is no peer of this host".into() }.encode()),
        ("name", b"web1.example-2_x".to_vec()),
    ])
}

/// A guest as its VMM describes it.
pub(super) fn shape() -> GuestShape {
    let leaf = |function: u32, eax: u32| CpuidEntry {
        function: function.into(),
        index: 0.into(),
        flags: 0.into(),
        eax: eax.into(),
        ebx: 0x756e_6547.into(),
        ecx: 0x6c65_746e.into(),
        edx: 0x4965_6e69.into(),
    };
    GuestShape {
        name: "web1".parse().unwrap(),
        tracker: TrackerKind::Ring,
        machine: Machine {
            vmm: "memlane-vmm".parse().unwrap(),
            state_version: 1,
            vcpus: 2,
            features: Machine::KVM | Machine::IRQCHIP,
            tsc_khz: 2_500_000,
            xcr0: 7,
            xsave_bytes: 832,
            cpuid: vec![leaf(0, 0x16), leaf(1, 0x0009_06ea)],
            msrs: vec![0x10, 0x1b, 0xc000_0080],
        },
        regions: vec![
            Region { address: 0, bytes: 640 << 10, page_bytes: 4 << 10, offset: 0 },
            Region { address: 2 << 20, bytes: 64 << 20, page_bytes: 2 << 20, offset: 2 << 20 },
        ],
        nics: vec![Nic { mac: [0x52, 0x54, 0, 0x4d, 0x4c, 1], network: "lan".parse().unwrap() }],
    }
}

fn offer(qemu: Option<QemuGuest>) -> Control {
    let data_bytes = 12 << 20;
    Control::Offer(Offer {
        migration: ID,
        check_only: false,
        data_bytes,
        shape: shape(),
        qemu: qemu.map(Box::new),
    })
}

fn qemu_guest() -> QemuGuest {
    QemuGuest {
        machine: "pc-q35-7.2".into(),
        cpu: "qemu64".into(),
        accelerator: "kvm".into(),
        disks: vec!["/var/lib/images/web1.qcow2".into(), "/dev/vg/web1".into()],
        definition: "name = \"web1\"\nmemory = \"64MiB\"\n".into(),
        parts: vec!["device d0 (virtio-blk-pci) on bus pcie.0, addr 01.0".into()],
    }
}

pub(super) fn control() -> Seeds {
    let handover = |message, reason: &str| Control::Handover {
        migration: ID,
        message,
        nanoseconds: 7_000_000,
        reason: reason.into(),
    };
    let port = |name: &str, address: &str| Port {
        name: name.parse().unwrap(),
        address: address.parse().unwrap(),
        lanes: 2,
    };
    let refusal = |what, reason: &str| Refusal { what, reason: reason.into() };
    let report = FetchReport { remaining_pages: 90, faults: 7, pages_fetched: 7, ..FetchReport::default() };
    let messages = [
        (
            "lanes-from",
            Control::LanesFrom(vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()]),
        ),
        ("offer", offer(None)),
        ("offer-qemu", offer(Some(qemu_guest()))),
        (
            "accept",
            Control::Accept(Accept {
                token: ID,
                ports: vec![port("a", "192.0.2.2:7411"), port("b", "[2001:db8::2]:7411")],
            }),
        ),
        (
            "refuse",
            Control::Refuse(vec![
                refusal(RefusalKind::Receiver, "no VMM waits for a guest named web1"),
                refusal(RefusalKind::Disk, "/dev/vg/web1 is not there"),
            ]),
        ),
        ("ping", Control::Ping(41)),
        ("pong", Control::Pong(41)),
        ("holes", Control::Holes(vec![0..16, 512..1024])),
        ("holes-done", Control::HolesDone),
        ("lane-lost", Control::LaneLost(1)),
        ("lane-closed", Control::LaneClosed(1)),
        ("iteration", Control::Iteration { number: 2, pages: 5000 }),
        ("verify", Control::Verify),
        ("digests", Control::Digests { digests: vec![(0, 1 << 100), (3, 7)], last: true }),
        ("state", Control::State { total: 30, offset: 10, bytes: b"the state of a guest".to_vec() }),
        ("fetch", Control::Fetch(ID)),
        ("missing", Control::Missing(Missing { first: 128, words: vec![0b1011, 0, u64::MAX], last: true })),
        ("missing-done", Control::MissingDone),
        ("fetched", Control::Fetched(report)),
        ("patience", Control::Patience { milliseconds: 30_000 }),
        ("received", Control::Received(40)),
        ("resume", Control::Resume { migration: ID, received: 40 }),
        ("resumed", Control::Resumed(17)),
        ("ready", handover(Message::Ready, "")),
        ("lost", handover(Message::Lost, "the VMM ended")),
    ];
    let all = messages.iter().flat_map(|(_, message)| message.encode()).collect();
    let each = messages.iter().map(|(name, message)| (*name, message.encode()));
    named(each.chain([("all-in-a-row", all)]))
}

/// The bytes of a lane of a guest of 1000 pages.
fn stream(parts: &[&[u8]]) -> Vec<u8> {
    [&1000_u64.to_le_bytes()[..], &parts.concat()].concat()
}

fn page(byte: u8) -> Vec<u8> {
    vec![byte; PAGE]
}

fn data(sequence: u64, checksum: Option<u32>) -> Vec<u8> {
    let mut head = Vec::new();
    encode_head(&mut head, sequence, &[Run { pages: 7..8, content: Content::Data }], checksum);
    [head, page(7)].concat()
}

fn without_data() -> Vec<u8> {
    let mut head = Vec::new();
    let runs =
        [Run { pages: 8..80, content: Content::Zero }, Run { pages: 100..1000, content: Content::Hole }];
    encode_head(&mut head, 2, &runs, None);
    head
}

fn compressed() -> Vec<u8> {
    let (mut head, block) = (Vec::new(), compress(&[page(1), page(2)].concat()));
    let runs = [Run { pages: 3..5, content: Content::Data }, Run { pages: 9..10, content: Content::Zero }];
    encode_compressed_head(&mut head, 3, &runs, Some(0x1234_5678), block.len() as u64);
    [head, block].concat()
}

pub(super) fn frame() -> Seeds {
    let keepalive = {
        let mut head = Vec::new();
        encode_head(&mut head, 1, &[], None);
        head
    };
    named([
        ("data", stream(&[&data(1, None)])),
        ("data-checksum", stream(&[&data(1, Some(1))])),
        ("without-data", stream(&[&without_data()])),
        ("compressed", stream(&[&compressed()])),
        ("keepalive", stream(&[&keepalive])),
        ("three", stream(&[&compressed(), &without_data(), &keepalive])),
        ("acknowledgement", stream(&[&Ack { sequence: 9 }.encode()])),
        ("page-request", stream(&[&PageRequest::Page(999).encode()])),
        ("request-keepalive", stream(&[&PageRequest::Keepalive.encode()])),
    ])
}
