//! A guest under KVM.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{CpuId, KVM_MP_STATE_RUNNABLE, kvm_cpuid_entry2, kvm_mp_state, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memlane_kvm::compat::{self, Feature, Program};
use memlane_kvm::dirty::{DirtyTracker, LogTracker, PagemapTracker, RingTracker, ring};
use memlane_kvm::ram::GuestRam;
use memlane_kvm::state::{MachineState, Moment, VmState};
use memlane_kvm::vcpu::{Capabilities, VcpuState, tsc_offset};
use memlane_protocol::wire::machine::{Machine, TrackerKind};

use super::clock::{ClockReading, TscClock};
use super::vcpu::{ThreadSlot, Vcpu, install_kick, lock};
use super::{GuestLayout, GuestMachine, long_mode};
use crate::gate::Gate;
use crate::workload::SLOTS;

/// The number of entries of each vCPU's dirty ring. A ring that is full stops its vCPU, so it has room for what a vCPU
/// writes between two harvests (256 MiB), and takes 1 MiB.
const RING_ENTRIES: u32 = 1 << 16;

/// The settings of a virtual machine.
#[derive(Clone, Debug)]
pub struct KvmOptions {
    /// This program, and the number of vCPUs.
    pub program: Program,
    /// The processor features that the guest is not given.
    pub without: Vec<Feature>,
    /// The way in which dirty pages are found.
    pub tracker: TrackerKind,
    /// Whether the guest comes from another host; otherwise it starts here.
    pub incoming: bool,
}

/// A virtual machine, its vCPUs, and their threads.
pub struct KvmGuest {
    program: Program,
    layout: GuestLayout,
    host: Capabilities,
    pit: bool,
    machine: Mutex<Machine>,
    clock: Arc<TscClock>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    seats: Arc<[ThreadSlot]>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    vm: Arc<VmFd>,
    /// The guest's memory. It is dropped after the virtual machine, which writes to it.
    _ram: Arc<GuestRam>,
}

impl KvmGuest {
    /// Makes the virtual machine, which is paused, and the tracker of its memory.
    pub fn new(
        options: &KvmOptions,
        layout: &GuestLayout,
        ram: &Arc<GuestRam>,
    ) -> Result<(Self, Box<dyn DirtyTracker>), String> {
        install_kick()?;
        let kvm = Kvm::new().map_err(|error| {
            format!("cannot open /dev/kvm: {error}; run with --guest process where there is no KVM")
        })?;
        let vm = Arc::new(kvm.create_vm().map_err(failed("make a virtual machine"))?);
        let size = match options.tracker {
            TrackerKind::Ring => Some(ring::enable(&vm, RING_ENTRIES).map_err(failed("use dirty rings"))?),
            _ => None,
        };
        // Without them the guest runs all the same; then there is less to move.
        let irqchip = vm.create_irq_chip().is_ok();
        let pit = irqchip && vm.create_pit2(kvm_pit_config::default()).is_ok();
        // SAFETY: the guest holds the RAM, and drops it after the VM and the vCPUs; the tracker,
        // which holds the VM too, holds the RAM itself.
        let slots = unsafe { ram.register(&vm, 0) }.map_err(failed("register the guest's memory"))?;
        let vcpus = (0..layout.vcpus())
            .map(|index| vm.create_vcpu(index.into()).map_err(failed("make a vCPU")))
            .collect::<Result<Vec<_>, _>>()?;

        let cpuid = compat::host_cpuid(&kvm, &options.without).map_err(failed("tell what it supports"))?;
        for (index, vcpu) in (0..).zip(&vcpus) {
            set_cpuid(vcpu, &cpuid, index)?;
        }
        let host =
            Capabilities::probe(&kvm, &vm, &vcpus[0], irqchip).map_err(failed("tell what it can restore"))?;
        let machine = match options.incoming {
            true => compat::describe_host(&kvm, &options.program, &options.without),
            false => {
                for (index, vcpu) in (0..).zip(&vcpus) {
                    set_registers(vcpu, layout, index)?;
                }
                compat::describe_guest(&options.program, &host, pit, &vcpus[0])
            }
        };
        let machine = Mutex::new(machine.map_err(failed("describe the machine"))?);

        let seats: Arc<[ThreadSlot]> = vcpus.iter().map(|_| ThreadSlot::default()).collect();
        let mut handle = None;
        let tracker: Box<dyn DirtyTracker> = match (options.tracker, size) {
            (TrackerKind::Ring, Some(size)) => {
                let mut tracker = RingTracker::new(Arc::clone(&vm), Arc::clone(ram), slots, size);
                for vcpu in &vcpus {
                    tracker.add_vcpu(vcpu).map_err(failed("map a dirty ring"))?;
                }
                let seats = Arc::clone(&seats);
                tracker.enable_throttling(move |vcpu| seats[vcpu].kick());
                handle = Some(tracker.handle());
                Box::new(tracker)
            }
            (TrackerKind::Pagemap, _) => {
                Box::new(PagemapTracker::new(Arc::clone(ram)).map_err(failed("track pages"))?)
            }
            _ => Box::new(
                LogTracker::new(Arc::clone(&vm), Arc::clone(ram), slots)
                    .map_err(failed("use the dirty log"))?,
            ),
        };

        let mut guest = Self {
            program: options.program.clone(),
            layout: layout.clone(),
            host,
            pit,
            machine,
            clock: Arc::default(),
            gate: Arc::new(Gate::closed(vcpus.len())),
            threads: Vec::new(),
            seats,
            vcpus: vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect(),
            vm,
            _ram: Arc::clone(ram),
        };
        guest.learn_clock()?;
        for (index, fd) in (0..).zip(&guest.vcpus) {
            let vcpu = Vcpu {
                index,
                fd: Arc::clone(fd),
                gate: Arc::clone(&guest.gate),
                ram: Arc::clone(ram),
                layout: layout.clone(),
                clock: Arc::clone(&guest.clock),
                ring: handle.clone(),
                seats: Arc::clone(&guest.seats),
            };
            guest.threads.push(vcpu.start().map_err(failed("start a thread"))?);
        }
        Ok((guest, tracker))
    }

    /// Returns the frequency of the guest's TSC, in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.host.tsc_khz
    }

    fn kick(&self) {
        self.seats.iter().for_each(ThreadSlot::kick);
    }

    /// Measures how far the guest's TSC is from the host's. The vCPUs must be paused.
    fn learn_clock(&self) -> Result<(), String> {
        let vcpu = lock(&self.vcpus[0]);
        let khz = vcpu.get_tsc_khz().map_err(failed("tell the TSC's frequency"))?;
        let offset =
            tsc_offset(&vcpu).ok_or("this KVM does not tell the offset of the guest's TSC (Linux 5.16)")?;
        self.clock.set(offset, khz);
        Ok(())
    }
}

impl GuestMachine for KvmGuest {
    fn machine(&self) -> Machine {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn clock(&self) -> ClockReading {
        self.clock.read()
    }

    fn stops_anywhere(&self) -> bool {
        true
    }

    fn image(&self) -> BTreeMap<u64, [u64; SLOTS]> {
        long_mode::image(&self.layout)
    }

    fn pause(&self) -> Result<(), String> {
        self.gate.close(|| self.kick())
    }

    fn resume(&self) -> Result<(), String> {
        self.gate.open()
    }

    fn save(&self, own: Vec<u8>) -> Result<Vec<u8>, String> {
        let now = Moment::now();
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuState::capture(&lock(vcpu), &self.host, &now));
        let state = MachineState {
            captured_at: now.realtime,
            vcpus: vcpus.collect::<Result<_, _>>().map_err(failed("read a vCPU's state"))?,
            vm: VmState::capture(&self.vm, self.host.irqchip, self.pit)
                .map_err(failed("read the machine's state"))?,
            own,
        };
        Ok(state.encode())
    }

    fn load(&self, state: &[u8]) -> Result<Vec<u8>, String> {
        let state = MachineState::decode(state, self.layout.vcpus()).map_err(|error| error.to_string())?;
        let now = Moment::now();
        let passed = state.passed(&now);
        state.vm.restore(&self.vm, passed).map_err(failed("restore the machine's state"))?;
        for (index, (vcpu, state)) in self.vcpus.iter().zip(&state.vcpus).enumerate() {
            state
                .restore(&lock(vcpu), &self.host, &now, passed)
                .map_err(|error| format!("cannot restore vCPU {index}: {error}"))?;
        }
        self.learn_clock()?;
        let machine = compat::describe_guest(&self.program, &self.host, self.pit, &lock(&self.vcpus[0]))
            .map_err(failed("describe the machine"))?;
        *self.machine.lock().unwrap_or_else(PoisonError::into_inner) = machine;
        Ok(state.own)
    }

    fn failure(&self, patience: Duration) -> Option<String> {
        self.gate.failure(patience)
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        self.gate.end(|| self.kick());
        for thread in self.threads.drain(..) {
            // A panic has been reported by its hook.
            let _ = thread.join();
        }
    }
}

/// Gives a vCPU its CPUID, with its own number in the leaves that contain it.
fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2], index: u16) -> Result<(), String> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        match entry.function {
            0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(index) << 24,
            0xb | 0x1f => entry.edx = index.into(),
            0x8000_001e => entry.eax = index.into(),
            _ => {}
        }
    }
    let cpuid = CpuId::from_entries(&entries).map_err(|_| "this KVM has too many CPUID entries")?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))
}

/// Puts a vCPU at the beginning of the guest's program.
fn set_registers(vcpu: &VcpuFd, layout: &GuestLayout, index: u16) -> Result<(), String> {
    let fresh = vcpu.get_sregs().map_err(failed("read special registers"))?;
    vcpu.set_sregs(&long_mode::special_registers(fresh)).map_err(failed("set special registers"))?;
    vcpu.set_regs(&long_mode::registers(layout, index)).map_err(failed("set registers"))?;
    // All but the first would wait for a start-up interrupt.
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
        .map_err(failed("make a vCPU runnable"))
}

fn failed<E: std::fmt::Display>(doing: &'static str) -> impl Fn(E) -> String {
    move |error| format!("cannot {doing}: {error}")
}
