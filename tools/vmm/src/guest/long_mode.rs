//! 64-bit mode without a boot: page tables written by the VMM, and registers that a vCPU starts
//! with.
//!
//! The program runs as a user program would, at privilege level 3, with the right to use ports
//! (IOPL 3). It needs no more, and on a KVM without hardware support, as in a cloud instance
//! that has PVM, user code runs at full speed while system code is emulated one instruction at a
//! time, some thousand times slower.

use std::collections::BTreeMap;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use memlane_protocol::PAGE_SIZE;

use super::code;
use super::layout::{CODE_PAGE, GuestLayout, SYSTEM_PAGES, TABLES_PAGE};
use crate::workload::SLOTS;

/// The flags of a page table's entry: present, writable, for user code, accessed. Flags that the processor would set
/// are set beforehand, so that page tables never change and can be compared.
const TABLE: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5;
/// The flags of an entry for a page of 2 MiB: those of [`TABLE`], with dirty and page size.
const LEAF: u64 = TABLE | 1 << 6 | 1 << 7;
const GIB: u64 = 1 << 30;
const LEAF_BYTES: u64 = 2 << 20;

/// Returns the pages that the VMM writes before the guest starts, by number: the code, and page tables that map RAM to
/// its own addresses.
pub fn image(layout: &GuestLayout) -> BTreeMap<u64, [u64; SLOTS]> {
    let mut image = BTreeMap::new();
    image.insert(CODE_PAGE, words(code::bytes()));
    let address = |page: u64| page * PAGE_SIZE;
    let (pml4, pdpt) = (TABLES_PAGE, TABLES_PAGE + 1);
    let mut top = [0; SLOTS];
    top[0] = address(pdpt) | TABLE;
    image.insert(pml4, top);
    let mut middle = [0; SLOTS];
    let mut next = pdpt + 1;
    for &(start, bytes) in layout.regions() {
        for gib in start / GIB..(start + bytes).div_ceil(GIB) {
            let mut bottom = [0; SLOTS];
            for (slot, entry) in bottom.iter_mut().enumerate() {
                let at = gib * GIB + slot as u64 * LEAF_BYTES;
                if (start..start + bytes).contains(&at) {
                    *entry = at | LEAF;
                }
            }
            assert!(next < SYSTEM_PAGES, "a layout has at most 256 GiB");
            middle[gib as usize] = address(next) | TABLE;
            image.insert(next, bottom);
            next += 1;
        }
    }
    image.insert(pdpt, middle);
    image
}

/// Returns the special registers of a vCPU; `fresh` are its registers after a reset.
pub fn special_registers(fresh: kvm_sregs) -> kvm_sregs {
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x2b,
        type_: 3, // read, write, accessed
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    // Read, execute, accessed; 64-bit.
    let code = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..data };
    let task = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        gdt: kvm_dtable::default(),
        idt: kvm_dtable::default(),
        cr0: 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1 << 0, // PG WP NE ET MP PE
        cr3: TABLES_PAGE * PAGE_SIZE,
        cr4: 1 << 10 | 1 << 9 | 1 << 5,  // OSXMMEXCPT OSFXSR PAE
        efer: 1 << 10 | 1 << 8 | 1 << 0, // LMA LME SCE
        ..fresh
    }
}

/// Returns the general registers that a vCPU starts with.
pub fn registers(layout: &GuestLayout, vcpu: u16) -> kvm_regs {
    kvm_regs {
        rip: CODE_PAGE * PAGE_SIZE,
        rdi: layout.block(vcpu).start * PAGE_SIZE,
        rflags: 3 << 12 | 1 << 1, // IOPL 3; bit 1 is always set
        ..Default::default()
    }
}

fn words(bytes: &[u8]) -> [u64; SLOTS] {
    assert!(bytes.len() as u64 <= PAGE_SIZE, "the program fits into its page");
    let mut page = [0; SLOTS];
    for (word, bytes) in page.iter_mut().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_le_bytes(padded);
    }
    page
}
