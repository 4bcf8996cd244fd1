//! What a daemon and the VMM of a guest say to each other, what it asks of the starter of VMMs, and the state that a VMM
//! saves.

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_msr_entry, kvm_xcrs};
use memlane_kvm::state::{MachineState, VmState};
use memlane_kvm::vcpu::VcpuState;
use memlane_protocol::wire::attach::{Bond, FromVmm, Reply, Request, RunState, ToVmm, VERSIONS, VmmHello};
use memlane_protocol::wire::starter::{GuestUsers, StartRequest};

use super::peer::shape;
use super::{Seeds, named};

pub(super) fn attach() -> Seeds {
    let (oldest, newest) = VERSIONS;
    let bond = |fetching| Bond { migration: [7; 16], peer: "host-b".parse().unwrap(), fetching };
    let hello = |run_state, bond| {
        FromVmm::Hello(VmmHello { oldest, newest, run_state, bond, shape: shape() }).encode()
    };
    let request = |request| ToVmm::Request { id: 5, request }.encode();
    let reply = |outcome| FromVmm::Reply(Reply { id: 5, outcome }).encode();
    named([
        ("hello-running", hello(RunState::Running, None)),
        ("hello-incoming", hello(RunState::Incoming, None)),
        ("hello-relinquished", hello(RunState::Relinquished, Some(bond(false)))),
        ("hello-loaded", hello(RunState::Loaded, Some(bond(true)))),
        ("shim", FromVmm::Shim { oldest, newest }.encode()),
        ("done", reply(Ok([1_000_000, 42]))),
        ("failed", reply(Err("the vCPUs do not stop".into()))),
        ("welcome", ToVmm::Welcome { version: newest }.encode()),
        ("refused", ToVmm::Refused { reason: "another VMM has a guest named web1".into() }.encode()),
        ("start-tracking", request(Request::StartTracking)),
        ("write-protect", request(Request::WriteProtect { first: 512, pages: 256 })),
        ("harvest", request(Request::Harvest)),
        ("throttle", request(Request::Throttle { pages_per_second: 20_000 })),
        ("stop-tracking", request(Request::StopTracking)),
        ("pause", request(Request::Pause { limit_nanoseconds: 300_000_000 })),
        ("resume", request(Request::Resume)),
        ("save", request(Request::Save)),
        ("load", request(Request::Load { bytes: 4096 })),
        ("relinquish", request(Request::Relinquish(bond(false)))),
        ("prepare", request(Request::Prepare(bond(true)))),
        ("discard", request(Request::Discard)),
        ("open-userfault", request(Request::OpenUserfault { keep: false })),
        ("keep-userfault", request(Request::OpenUserfault { keep: true })),
        ("kept-userfault", request(Request::KeptUserfault)),
        ("mapped-file", request(Request::MappedFile { address: 0x7f00_0000_0000 })),
    ])
}

pub(super) fn starter() -> Seeds {
    let arguments = ["-name", "web1", "-m", "64M", "-sandbox", "on,spawn=deny"];
    let request = StartRequest {
        user: 2_100_000_007,
        groups: vec![104],
        descriptors: 3,
        program: b"/usr/bin/qemu-system-x86_64".to_vec(),
        attach_socket: b"/run/memlane/attach.sock".to_vec(),
        arguments: arguments.map(Into::into).into(),
    };
    let bare = StartRequest { groups: Vec::new(), descriptors: 0, arguments: Vec::new(), ..request.clone() };
    named([
        ("request", request.encode()),
        ("bare-request", bare.encode()),
        ("users", GuestUsers::default().to_string().into_bytes()),
    ])
}

fn vcpu(whole: bool) -> VcpuState {
    VcpuState {
        cpuid: vec![kvm_cpuid_entry2 { function: 1, eax: 0x0009_06ea, ..Default::default() }],
        regs: Default::default(),
        sregs: Default::default(),
        xsave: vec![0; 64],
        xcrs: whole.then(|| kvm_xcrs { nr_xcrs: 1, ..Default::default() }),
        debugregs: Default::default(),
        events: Default::default(),
        mp_state: Default::default(),
        msrs: vec![kvm_msr_entry { index: 0xc000_0080, data: 0xd01, ..Default::default() }],
        lapic: whole.then(Default::default),
        tsc: 1 << 40,
        tsc_khz: 2_500_000,
    }
}

pub(super) fn state() -> Seeds {
    let state = |vcpus: u8, whole: bool| {
        let state = MachineState {
            captured_at: 1_800_000_000_000_000_000,
            vm: VmState {
                irqchips: whole.then_some([[1; _], [2; _], [3; _]]),
                pit: whole.then(Default::default),
                clock: kvm_clock_data { clock: 77, ..Default::default() },
            },
            vcpus: (0..vcpus).map(|_| vcpu(whole)).collect(),
            own: b"what the VMM adds".to_vec(),
        };
        [&[vcpus][..], &state.encode()].concat()
    };
    named([
        ("no-vcpu", state(0, false)),
        ("a-vcpu", state(1, false)),
        ("two-vcpus", state(2, false)),
        ("all", state(1, true)),
    ])
}
