//! The guest's program. It runs in 64-bit mode at privilege level 3 with interrupts off, without a
//! stack, and at whatever address it is copied to.
//!
//! It does what [`Stepper`](crate::workload::Stepper) does and reports what
//! [`ControlBlock`] describes. Registers:
//!
//! | register | holds |
//! | --- | --- |
//! | rdi | the control block |
//! | r8  | the random generator's state, which is the value written |
//! | r9  | steps done |
//! | r10 | address of the part's first page |
//! | r12 | ticks from which a gap is a stall |
//! | r13 | the TSC when it was last read |
//! | r14 | the next page, if pages are written in order |
//! | r15 | when the sleep that was asked for ends |
//! | rbx | steps left in this period |
//! | rbp | where to go on after a stall was noted |
//!
//! A vCPU that only reads has another loop. It never looks at the clock nor sleeps, and differs in these:
//!
//! | register | holds |
//! | --- | --- |
//! | r9  | pages read |
//! | r11 | the sum that it computes of all that it reads |
//! | r12 | the odd factor of that sum |
//! | rbx | pages left until it counts them |

use std::arch::global_asm;
use std::mem::offset_of;

use super::block::{ControlBlock, READS_PER_COUNT, RING, Stall};
use crate::workload::{READ_FACTOR, SLOTS};

/// The port whose access means: wait until the block's deadline.
pub const SLEEP_PORT: u16 = 0x6d;

/// Returns the program's bytes.
pub fn bytes() -> &'static [u8] {
    unsafe extern "C" {
        static memlane_guest_code: u8;
        static memlane_guest_code_end: u8;
    }
    let (start, end) = (&raw const memlane_guest_code, &raw const memlane_guest_code_end);
    // SAFETY: both labels lie in one read-only section, in this order, with the program between them.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

const RING_MASK: u64 = RING as u64 - 1;
const STALL_SHIFT: u32 = size_of::<Stall>().ilog2();

global_asm!(
    r#"
    .macro memlane_next_random          # r8; uses rax
    mov     rax, r8
    shl     rax, 13
    xor     r8, rax
    mov     rax, r8
    shr     rax, 7
    xor     r8, rax
    mov     rax, r8
    shl     rax, 17
    xor     r8, rax
    .endm

    .macro memlane_address_of_page      # number rcx of the part, to rax
    mov     rax, rcx
    shl     rax, 12
    add     rax, r10
    cmp     rcx, [rdi + {split}]
    jb      .Lmemlane_below_hole\@
    add     rax, [rdi + {hole_bytes}]
.Lmemlane_below_hole\@:
    .endm

    .pushsection .rodata.memlane_guest, "a", @progbits
    .global memlane_guest_code
    .global memlane_guest_code_end
memlane_guest_code:
    mov     r8, [rdi + {random}]
    mov     r10, [rdi + {base}]
    cmp     qword ptr [rdi + {reader}], 0
    jne     .Lmemlane_reader
    mov     r9, [rdi + {steps}]
    mov     r12, [rdi + {threshold}]
    xor     r14d, r14d
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     r13, rax
    mov     r15, rax

.Lmemlane_period:
    mov     rax, [rdi + {credit}]
    add     rax, [rdi + {per_period}]
    mov     rbx, rax
    shr     rbx, 32
    mov     eax, eax
    mov     [rdi + {credit}], rax
    test    rbx, rbx
    jz      .Lmemlane_sleep

.Lmemlane_step:
    memlane_next_random
    cmp     qword ptr [rdi + {sequential}], 0
    jne     .Lmemlane_sequential
    mov     rcx, r8
    shr     rcx, 32
    mov     eax, r8d
    shr     eax, 16
    mov     rdx, [rdi + {hot_pages}]
    cmp     rax, [rdi + {hot_chance}]
    jae     .Lmemlane_cold
    imul    rcx, rdx
    shr     rcx, 32
    jmp     .Lmemlane_write
.Lmemlane_cold:
    mov     rax, [rdi + {pages}]
    sub     rax, rdx
    imul    rcx, rax
    shr     rcx, 32
    add     rcx, rdx
    jmp     .Lmemlane_write
.Lmemlane_sequential:
    mov     rcx, r14
    inc     r14
    cmp     r14, [rdi + {pages}]
    jne     .Lmemlane_write
    xor     r14d, r14d

.Lmemlane_write:
    memlane_address_of_page
    mov     edx, r8d
    and     edx, 511
    mov     [rax + rdx * 8], r8
    inc     r9
    mov     [rdi + {steps}], r9

    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     rcx, rax
    sub     rcx, r13
    mov     rdx, r13
    mov     r13, rax
    cmp     rcx, r12
    jb      .Lmemlane_next
    lea     rbp, [rip + .Lmemlane_next]
    jmp     .Lmemlane_stall
.Lmemlane_next:
    dec     rbx
    jnz     .Lmemlane_step

.Lmemlane_sleep:
    cmp     qword ptr [rdi + {period}], 0
    je      .Lmemlane_period
    add     r15, [rdi + {period}]
    cmp     r15, r13
    ja      .Lmemlane_set_deadline
    mov     r15, r13                    # too late for this one; do not try to catch up
.Lmemlane_set_deadline:
    mov     [rdi + {deadline}], r15
.Lmemlane_sleep_on:
    mov     edx, {port}
    out     dx, eax
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    cmp     rax, r15
    jb      .Lmemlane_sleep_on          # woken early
    mov     r13, rax
    mov     rcx, rax
    sub     rcx, r15                    # woken late: only this counts
    mov     rdx, r15
    cmp     rcx, r12
    jb      .Lmemlane_period
    lea     rbp, [rip + .Lmemlane_period]

.Lmemlane_stall:                        # of rcx ticks, from rdx
    mov     rax, [rdi + {stalls}]
    and     eax, {ring_mask}
    shl     eax, {stall_shift}
    mov     [rdi + rax + {ring} + {begin}], rdx
    mov     [rdi + rax + {ring} + {ticks}], rcx
    bsr     rax, rcx
    inc     qword ptr [rdi + rax * 8 + {histogram}]
    cmp     rcx, [rdi + {longest}]
    jbe     .Lmemlane_not_longest
    mov     [rdi + {longest}], rcx
.Lmemlane_not_longest:
    inc     qword ptr [rdi + {stalls}]
    jmp     rbp

.Lmemlane_reader:
    mov     r9, [rdi + {reads}]
    xor     r11d, r11d
    movabs  r12, {factor}
.Lmemlane_until_count:
    mov     ebx, {reads_per_count}
.Lmemlane_read:
    memlane_next_random
    mov     rcx, r8
    shr     rcx, 32
    imul    rcx, [rdi + {pages}]
    shr     rcx, 32
    memlane_address_of_page
    mov     ecx, {words}
.Lmemlane_word:
    xor     r11, [rax]
    imul    r11, r12
    add     rax, 8
    dec     ecx
    jnz     .Lmemlane_word
    dec     ebx
    jnz     .Lmemlane_read
    add     r9, {reads_per_count}
    mov     [rdi + {reads}], r9
    jmp     .Lmemlane_until_count
memlane_guest_code_end:
    .popsection
    .purgem memlane_next_random
    .purgem memlane_address_of_page
    "#,
    reader = const offset_of!(ControlBlock, reader),
    base = const offset_of!(ControlBlock, base),
    pages = const offset_of!(ControlBlock, pages),
    split = const offset_of!(ControlBlock, split),
    hole_bytes = const offset_of!(ControlBlock, hole_bytes),
    hot_pages = const offset_of!(ControlBlock, hot_pages),
    hot_chance = const offset_of!(ControlBlock, hot_chance),
    sequential = const offset_of!(ControlBlock, sequential),
    per_period = const offset_of!(ControlBlock, per_period),
    period = const offset_of!(ControlBlock, period),
    threshold = const offset_of!(ControlBlock, threshold),
    random = const offset_of!(ControlBlock, random),
    credit = const offset_of!(ControlBlock, credit),
    deadline = const offset_of!(ControlBlock, deadline),
    steps = const offset_of!(ControlBlock, steps),
    reads = const offset_of!(ControlBlock, reads),
    stalls = const offset_of!(ControlBlock, stalls),
    longest = const offset_of!(ControlBlock, longest),
    histogram = const offset_of!(ControlBlock, histogram),
    ring = const offset_of!(ControlBlock, ring),
    begin = const offset_of!(Stall, begin),
    ticks = const offset_of!(Stall, ticks),
    ring_mask = const RING_MASK,
    stall_shift = const STALL_SHIFT,
    port = const SLEEP_PORT,
    factor = const READ_FACTOR,
    reads_per_count = const READS_PER_COUNT,
    words = const SLOTS,
);
