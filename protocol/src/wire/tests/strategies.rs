//! Values that are valid, as the daemons and VMMs make them.

use std::net::SocketAddr;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;

use crate::PAGE_SIZE;
use crate::handover::Message;
use crate::wire::Label;
use crate::wire::attach::{self, FromVmm, MAX_STATE_BYTES, Reply, Request, RunState, ToVmm};
use crate::wire::control::{
    Accept, Control, FetchReport, Missing, Offer, Port, QemuGuest, Refusal, RefusalKind,
};
use crate::wire::frame::{Ack, Content, MAX_PAYLOAD_BYTES, MAX_RUNS, MAX_ZERO_PAGES, PageRequest, Run};
use crate::wire::hello::{Answer, Hello, Purpose};
use crate::wire::machine::{CpuidEntry, GuestShape, MAX_VCPUS, Machine, Nic, Region, TrackerKind};
use crate::wire::starter::{MAX_DESCRIPTORS, StartRequest};

pub(super) fn label() -> impl Strategy<Value = Label> {
    "[A-Za-z0-9][A-Za-z0-9._-]{0,62}".prop_map(|name| name.parse().unwrap())
}

/// Plain text of all alphabets that is not cut.
pub(super) fn text() -> impl Strategy<Value = String> {
    "[\\PC&&[^\\p{Zl}\\p{Zp}]]{0,120}"
}

pub(super) fn start_request() -> impl Strategy<Value = StartRequest> {
    let text = || vec(any::<u8>(), 0..60);
    let groups = vec(any::<u32>(), 0..5);
    (any::<u32>(), groups, 0..=MAX_DESCRIPTORS, text(), text(), vec(text(), 0..8)).prop_map(
        |(user, groups, descriptors, program, attach_socket, arguments)| StartRequest {
            user,
            groups,
            descriptors,
            program,
            attach_socket,
            arguments,
        },
    )
}

pub(super) fn guest_shape() -> impl Strategy<Value = GuestShape> {
    let trackers = [TrackerKind::Log, TrackerKind::Ring, TrackerKind::Pagemap];
    (label(), prop::sample::select(trackers.to_vec()), machine(), regions(), vec(nic(), 0..4)).prop_map(
        |(name, tracker, machine, regions, nics)| GuestShape { name, tracker, machine, regions, nics },
    )
}

fn machine() -> impl Strategy<Value = Machine> {
    let numbers = (any::<u16>(), 1..=MAX_VCPUS, any::<u32>(), any::<u32>(), any::<u64>(), any::<u32>());
    let msrs = prop::collection::btree_set(any::<u32>(), 0..12);
    (label(), numbers, vec(cpuid_entry(), 0..8), msrs).prop_map(|(vmm, numbers, cpuid, msrs)| {
        let (state_version, vcpus, features, tsc_khz, xcr0, xsave_bytes) = numbers;
        let msrs = msrs.into_iter().collect();
        Machine { vmm, state_version, vcpus, features, tsc_khz, xcr0, xsave_bytes, cpuid, msrs }
    })
}

fn cpuid_entry() -> impl Strategy<Value = CpuidEntry> {
    any::<[u32; 7]>().prop_map(|words| {
        let [function, index, flags, eax, ebx, ecx, edx] = words.map(Into::into);
        CpuidEntry { function, index, flags, eax, ebx, ecx, edx }
    })
}

/// Regions of both page sizes, adjacent or with gaps between them.
fn regions() -> impl Strategy<Value = Vec<Region>> {
    let region = (prop::bool::ANY, 1..=1u64 << 18, 0..=1u64 << 18, 0..=1u64 << 30);
    vec(region, 1..6).prop_map(|regions| {
        let mut free_from = 0u64;
        let placed = regions.into_iter().map(|(huge, pages, gap, offset)| {
            let page_bytes: u32 = if huge { 2 << 20 } else { 4 << 10 };
            let page = u64::from(page_bytes);
            let gap = if gap % 3 == 0 { 0 } else { gap };
            let address = free_from.next_multiple_of(page) + gap * page;
            free_from = address + pages * page;
            Region { address, bytes: pages * page, page_bytes, offset: offset * page }
        });
        placed.collect()
    })
}

fn nic() -> impl Strategy<Value = Nic> {
    (any::<[u8; 6]>(), label()).prop_map(|(mac, network)| Nic { mac, network })
}

pub(super) fn from_vmm() -> impl Strategy<Value = FromVmm> {
    let run_states = [RunState::Running, RunState::Incoming, RunState::Relinquished, RunState::Loaded];
    let hello =
        (versions(), prop::sample::select(run_states.to_vec()), prop::option::of(bond()), guest_shape());
    let reply = (any::<u32>(), prop_oneof![any::<[u64; 2]>().prop_map(Ok), text().prop_map(Err)]);
    prop_oneof![
        hello.prop_map(|((oldest, newest), run_state, bond, shape)| {
            FromVmm::Hello(attach::VmmHello { oldest, newest, run_state, bond, shape })
        }),
        versions().prop_map(|(oldest, newest)| FromVmm::Shim { oldest, newest }),
        reply.prop_map(|(id, outcome)| FromVmm::Reply(Reply { id, outcome })),
    ]
}

pub(super) fn to_vmm() -> impl Strategy<Value = ToVmm> {
    prop_oneof![
        any::<u16>().prop_map(|version| ToVmm::Welcome { version }),
        text().prop_map(|reason| ToVmm::Refused { reason }),
        (any::<u32>(), request()).prop_map(|(id, request)| ToVmm::Request { id, request }),
    ]
}

fn bond() -> impl Strategy<Value = attach::Bond> {
    (any::<u128>(), label(), any::<bool>()).prop_map(|(migration, peer, fetching)| attach::Bond {
        migration: migration.max(1).to_le_bytes(),
        peer,
        fetching,
    })
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::StartTracking),
        any::<(u64, u64)>().prop_map(|(first, pages)| Request::WriteProtect { first, pages }),
        Just(Request::Harvest),
        any::<u64>().prop_map(|pages_per_second| Request::Throttle { pages_per_second }),
        Just(Request::StopTracking),
        any::<u64>().prop_map(|limit_nanoseconds| Request::Pause { limit_nanoseconds }),
        Just(Request::Resume),
        Just(Request::Save),
        (0..=MAX_STATE_BYTES).prop_map(|bytes| Request::Load { bytes }),
        bond().prop_map(Request::Relinquish),
        bond().prop_map(Request::Prepare),
        Just(Request::Discard),
        any::<bool>().prop_map(|keep| Request::OpenUserfault { keep }),
        Just(Request::KeptUserfault),
        any::<u64>().prop_map(|address| Request::MappedFile { address }),
    ]
}

/// Oldest and newest.
fn versions() -> impl Strategy<Value = (u16, u16)> {
    any::<(u16, u16)>().prop_map(|(a, b)| (a.min(b), a.max(b)))
}

pub(super) fn hello() -> impl Strategy<Value = Hello> {
    let purpose = prop_oneof![
        Just(Purpose::Control),
        any::<([u8; 16], u16)>().prop_map(|(token, lane)| Purpose::Lane { token, lane }),
        any::<[u8; 16]>().prop_map(|token| Purpose::Faults { token }),
        any::<([u8; 16], u16)>().prop_map(|(token, lane)| Purpose::State { token, lane }),
        Just(Purpose::Probe),
    ];
    (versions(), label(), purpose).prop_map(|((oldest, newest), host, purpose)| Hello {
        oldest,
        newest,
        host,
        purpose,
    })
}

/// Versions count from 1.
pub(super) fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        (1..=u16::MAX).prop_map(|version| Answer::Welcome { version }),
        text().prop_map(|reason| Answer::Refused { reason }),
    ]
}

pub(super) fn control() -> impl Strategy<Value = Control> {
    prop_oneof![
        vec(any::<std::net::IpAddr>().prop_map(|address| address.to_canonical()), 0..8)
            .prop_map(Control::LanesFrom),
        offer().prop_map(Control::Offer),
        (any::<[u8; 16]>(), vec(port(), 0..8))
            .prop_map(|(token, ports)| Control::Accept(Accept { token, ports })),
        vec(refusal(), 0..8).prop_map(Control::Refuse),
        any::<u64>().prop_map(Control::Ping),
        any::<u64>().prop_map(Control::Pong),
        vec(any::<(u64, u64)>().prop_map(|(start, end)| start..end), 0..40).prop_map(Control::Holes),
        Just(Control::HolesDone),
        any::<u16>().prop_map(Control::LaneLost),
        any::<u16>().prop_map(Control::LaneClosed),
        any::<(u32, u64)>().prop_map(|(number, pages)| Control::Iteration { number, pages }),
        Just(Control::Verify),
        (vec(any::<(u64, u128)>(), 0..40), any::<bool>())
            .prop_map(|(digests, last)| Control::Digests { digests, last }),
        state(),
        any::<[u8; 16]>().prop_map(Control::Fetch),
        (0..=u64::MAX / 64, vec(any::<u64>(), 0..40), any::<bool>())
            .prop_map(|(word, words, last)| Control::Missing(Missing { first: word * 64, words, last })),
        Just(Control::MissingDone),
        fetch_report().prop_map(Control::Fetched),
        any::<u32>().prop_map(|milliseconds| Control::Patience { milliseconds }),
        any::<u64>().prop_map(Control::Received),
        any::<([u8; 16], u64)>().prop_map(|(migration, received)| Control::Resume { migration, received }),
        any::<u64>().prop_map(Control::Resumed),
        handover(),
    ]
}

fn offer() -> impl Strategy<Value = Offer> {
    let qemu = prop::option::of(qemu_guest());
    (any::<[u8; 16]>(), any::<bool>(), any::<u64>(), guest_shape(), qemu).prop_map(
        |(migration, check_only, data_bytes, shape, qemu)| Offer {
            migration,
            check_only,
            data_bytes,
            shape,
            qemu: qemu.map(Box::new),
        },
    )
}

fn qemu_guest() -> impl Strategy<Value = QemuGuest> {
    (text(), text(), text(), vec(text(), 0..4), text(), vec(text(), 0..4)).prop_map(
        |(machine, cpu, accelerator, disks, definition, parts)| QemuGuest {
            machine,
            cpu,
            accelerator,
            disks,
            definition,
            parts,
        },
    )
}

/// An IPv4 address that was written as IPv6 comes back as IPv4.
fn port() -> impl Strategy<Value = Port> {
    let address =
        any::<SocketAddr>().prop_map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()));
    (label(), address, any::<u16>()).prop_map(|(name, address, lanes)| Port { name, address, lanes })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let kinds = [
        RefusalKind::Receiver,
        RefusalKind::Machine,
        RefusalKind::Memory,
        RefusalKind::Port,
        RefusalKind::Network,
        RefusalKind::Busy,
        RefusalKind::Bandwidth,
        RefusalKind::Host,
        RefusalKind::Disk,
    ];
    (prop::sample::select(kinds.to_vec()), text()).prop_map(|(what, reason)| Refusal { what, reason })
}

/// Any piece of any state, the empty one and the last one included.
pub(super) fn state() -> impl Strategy<Value = Control> {
    (vec(any::<u8>(), 0..600), 0..=MAX_STATE_BYTES, any::<u64>()).prop_map(|(bytes, total, offset)| {
        let total = total.max(bytes.len() as u64);
        let offset = offset % (total - bytes.len() as u64 + 1);
        Control::State { total, offset, bytes }
    })
}

fn fetch_report() -> impl Strategy<Value = FetchReport> {
    any::<[u64; 8]>().prop_map(|[remaining_pages, faults, p50, p99, max, fetched, streamed, nanoseconds]| {
        FetchReport {
            remaining_pages,
            faults,
            fault_p50_nanoseconds: p50,
            fault_p99_nanoseconds: p99,
            fault_max_nanoseconds: max,
            pages_fetched: fetched,
            pages_streamed: streamed,
            nanoseconds,
        }
    })
}

fn handover() -> impl Strategy<Value = Control> {
    let words = [
        Message::Ready,
        Message::Commit,
        Message::Running,
        Message::Declined,
        Message::Done,
        Message::Abort,
        Message::Fetching,
        Message::Lost,
        Message::Gone,
        Message::Withdraw,
        Message::Unknown,
        Message::Recovering,
    ];
    (any::<[u8; 16]>(), prop::sample::select(words.to_vec()), any::<u64>(), text()).prop_map(
        |(migration, message, nanoseconds, reason)| Control::Handover {
            migration,
            message,
            nanoseconds,
            reason,
        },
    )
}

pub(super) fn ack() -> impl Strategy<Value = Ack> {
    any::<u64>().prop_map(|sequence| Ack { sequence })
}

/// Pages of a guest, and a request for one of them.
pub(super) fn page_request() -> impl Strategy<Value = (u64, PageRequest)> {
    let wanted = (1..=u64::MAX, any::<u64>());
    prop_oneof![
        wanted.prop_map(|(pages, page)| (pages, PageRequest::Page(page % pages))),
        any::<u64>().prop_map(|pages| (pages, PageRequest::Keepalive)),
    ]
}

/// Pages of a guest, and runs of a frame that fit into them and into the limits.
pub(super) fn frame() -> impl Strategy<Value = (u64, Vec<Run>)> {
    let contents = prop::sample::select(vec![Content::Data, Content::Zero, Content::Hole]);
    let run = (any::<u64>(), 1..=MAX_ZERO_PAGES, contents);
    (1..=1u64 << 34, vec(run, 0..=MAX_RUNS)).prop_map(|(pages, wanted)| {
        let mut room = MAX_PAYLOAD_BYTES / PAGE_SIZE;
        let runs = wanted.into_iter().map(|(first, count, content)| {
            if content == Content::Data && room > 0 {
                // Few pages at a time, so that many runs share a frame.
                let count = (count % 8 + 1).min(room).min(pages);
                room -= count;
                return Run { pages: place(first, count, pages), content: Content::Data };
            }
            let content = if content == Content::Data { Content::Zero } else { content };
            Run { pages: place(first, count.min(pages), pages), content }
        });
        (pages, runs.collect())
    })
}

fn place(first: u64, count: u64, pages: u64) -> Range<u64> {
    let first = first % (pages - count + 1);
    first..first + count
}
