//! The smallest guest that writes memory: a few instructions, in long or in protected mode.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_segment;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::skipped;
use crate::dirty::ring::EXIT_RING_FULL;
use crate::ram::{Backing, GuestRam, MemorySlot};

/// Where the code lies.
const CODE_ADDRESS: u64 = 0x1000;
/// Page tables of long mode: PML4, PDPT, and a PD of 2 MiB pages, one after another.
const TABLES_ADDRESS: u64 = 0x2000;

/// Flags in which a user may use `out`: bit 1 is always set, bits 12 and 13 are the level.
const IO_ALLOWED: u64 = 1 << 1 | 3 << 12;

/// The mode that a vCPU runs in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// 64 bits, with paging, as a user: what every host can run by itself.
    Long,
    /// 32 bits, without paging: what some hosts can only emulate.
    Protected,
}

/// The same in both modes. Counts in ebx and writes the count to random pages: at esi (any page of 32 MiB), and at
/// 0x20000 to 0x3ffff. Every 256 turns it leaves by `out`.
#[rustfmt::skip]
const CODE: [u8; 52] = [
    0x69, 0xc0, 0x0d, 0x66, 0x19, 0x00, // again: imul eax, eax, 1664525
    0x05, 0x5f, 0xf3, 0x6e, 0x3c,       // add eax, 1013904223
    0x89, 0xc7,                         // mov edi, eax
    0xc1, 0xef, 0x04,                   // shr edi, 4
    0x81, 0xe7, 0x00, 0xf0, 0xff, 0x01, // and edi, 0x1fff000
    0xff, 0xc3,                         // inc ebx
    0x89, 0x1c, 0x3e,                   // mov [esi + edi], ebx
    0x89, 0xc7,                         // mov edi, eax
    0xc1, 0xef, 0x08,                   // shr edi, 8
    0x81, 0xe7, 0x00, 0xf0, 0x01, 0x00, // and edi, 0x1f000
    0x89, 0x9f, 0x00, 0x00, 0x02, 0x00, // mov [edi + 0x20000], ebx
    0x84, 0xdb,                         // test bl, bl
    0x75, 0xd0,                         // jnz again
    0xe6, 0x10,                         // out 0x10, al
    0xeb, 0xcc,                         // jmp again
];

pub(super) struct Guest {
    pub(super) vm: Arc<VmFd>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) slots: Vec<MemorySlot>,
    vcpus: Vec<Mutex<VcpuFd>>,
}

impl Guest {
    pub(super) fn new(name: &str, layout: &[(u64, u64)], backing: &Backing) -> Option<Self> {
        Self::over(name, Arc::new(GuestRam::create(layout, backing).unwrap()))
    }

    pub(super) fn over(name: &str, ram: Arc<GuestRam>) -> Option<Self> {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = Arc::new(vm.map_err(|error| skipped(name, format!("/dev/kvm: {error}"))).ok()?);
        // SAFETY: `vm` is dropped before `ram`, or with the process.
        let slots = unsafe { ram.register(&vm, 0) }.unwrap();
        ram.memory().write_slice(&CODE, GuestAddress(CODE_ADDRESS)).unwrap();
        for (table, entry) in [(0, TABLES_ADDRESS + 0x1027), (0x1000, TABLES_ADDRESS + 0x2027)] {
            ram.memory().write_obj(entry, GuestAddress(TABLES_ADDRESS + table)).unwrap();
        }
        for index in 0..24u64 {
            let (large, address) = (index << 21 | 0xe7, TABLES_ADDRESS + 0x2000 + index * 8);
            ram.memory().write_obj(large, GuestAddress(address)).unwrap();
        }
        Some(Self { vm, ram, slots, vcpus: Vec::new() })
    }

    pub(super) fn add_vcpus(&mut self, mode: Mode, count: u64, mut made: impl FnMut(&VcpuFd)) {
        for id in 0..count {
            let vcpu = self.vm.create_vcpu(id).unwrap();
            let mut sregs = vcpu.get_sregs().unwrap();
            let flat =
                kvm_segment { base: 0, limit: u32::MAX, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
            sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
            let data = kvm_segment { selector: 16, type_: 3, ..flat };
            (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
            sregs.cr0 |= 1;
            if mode == Mode::Long {
                let user = |selector, segment| kvm_segment { selector, dpl: 3, ..segment };
                sregs.cs = kvm_segment { l: 1, db: 0, ..user(0x33, sregs.cs) };
                (sregs.ds, sregs.es, sregs.ss) = (user(0x2b, data), user(0x2b, data), user(0x2b, data));
                (sregs.cr3, sregs.cr4, sregs.efer) = (TABLES_ADDRESS, 1 << 5, 1 << 8 | 1 << 10);
                sregs.cr0 |= 1 << 31;
            }
            vcpu.set_sregs(&sregs).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rflags, regs.rax, regs.rbx) = (CODE_ADDRESS, IO_ALLOWED, id + 1, 0);
            regs.rsi = self.ram.regions()[1].address + 8 * id;
            vcpu.set_regs(&regs).unwrap();
            made(&vcpu);
            self.vcpus.push(Mutex::new(vcpu));
        }
    }

    /// Runs all vCPUs until `stop` is set, counting how often they leave the guest.
    pub(super) fn run(&self, stop: &AtomicBool, turns: &AtomicU64, ring_full: &(dyn Fn() + Sync)) {
        std::thread::scope(|scope| {
            for vcpu in &self.vcpus {
                scope.spawn(|| {
                    let mut vcpu = vcpu.lock().unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        match vcpu.run().unwrap() {
                            VcpuExit::IoOut(0x10, _) => turns.fetch_add(1, Ordering::Relaxed),
                            VcpuExit::Unsupported(EXIT_RING_FULL) => {
                                ring_full();
                                continue;
                            }
                            other => panic!("unexpected exit: {other:?}"),
                        };
                    }
                });
            }
        });
    }
}
