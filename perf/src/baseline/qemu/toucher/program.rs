//! The guest's program, as a Multiboot kernel (version 1 of that specification): 32-bit code without paging, a stack
//! or interrupts, at a fixed address.
//!
//! It reads one word of each page in an order that looks random, over and over, and times each read by the TSC. What
//! took long it writes into a log, which is read from the guest's memory when it has moved.

use std::arch::global_asm;
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

/// The address of the program in the guest's memory.
const PROGRAM: u32 = 1 << 20;
/// The address of its [`ProgramBlock`].
const BLOCK: u32 = PROGRAM + 0x1000;
/// The address of its log.
const LOG: u32 = 2 << 20;
/// The number of reads that the log remembers, more than the largest guest has pages.
const LOG_ENTRIES: u32 = 1 << 20;
/// The end of the memory that the program needs for itself. The memory that it reads lies above.
pub(super) const LOW_MEMORY: usize = 16 << 20;
/// The largest memory of the guest, in bytes. PCs have their memory in one piece up to here, and the log has room for
/// each page.
pub(super) const MOST_MEMORY: usize = 2 << 30;
const PAGE: usize = 4096;

/// The values that the program is given, and those that it reports.
#[repr(C)]
struct ProgramBlock {
    /// The first page that is read.
    first: u32,
    /// The number of pages that are read.
    pages: u32,
    /// The power of two that is not below `pages`, less one.
    mask: u32,
    /// Half of the number of bits of `mask`.
    shift: u32,
    /// The number of ticks from which a read has taken long.
    threshold: u32,
    /// The value 1 as soon as the program runs.
    runs: u32,
    /// The number of reads that have taken long, modulo 2^32.
    waits: u32,
}

/// Returns the program for a guest with so many bytes of memory. Reads that take `threshold` ticks count as long.
pub(super) fn image(bytes: usize, threshold: u32) -> Vec<u8> {
    let pages = u32::try_from((bytes - LOW_MEMORY) / PAGE).expect("no guest is larger than 2 GiB");
    let mask = pages.next_power_of_two() - 1;
    let block = ProgramBlock {
        first: (LOW_MEMORY / PAGE) as u32,
        pages,
        mask,
        shift: mask.count_ones().div_ceil(2),
        threshold,
        runs: 0,
        waits: 0,
    };
    let ProgramBlock { first, pages, mask, shift, threshold, runs, waits } = block;
    let mut image = code().to_vec();
    image.resize((BLOCK - PROGRAM) as usize, 0);
    image.extend(
        [first, pages, mask, shift, threshold, runs, waits].iter().flat_map(|word| word.to_le_bytes()),
    );
    image
}

/// Resets the guest's memory to say that the program does not run yet.
pub(super) fn reset(memory: &File) -> Result<()> {
    let at = u64::from(BLOCK) + offset_of!(ProgramBlock, runs) as u64;
    memory.write_all_at(&[0; size_of::<u32>()], at).context("writing to the guest's memory")
}

/// Returns whether the program runs.
pub(super) fn runs(memory: &File) -> Result<bool> {
    Ok(word(memory, BLOCK + offset_of!(ProgramBlock, runs) as u32)? != 0)
}

/// Returns how many reads have taken long, modulo 2^32.
pub(super) fn waits(memory: &File) -> Result<u32> {
    word(memory, BLOCK + offset_of!(ProgramBlock, waits) as u32)
}

/// Returns how many ticks each long read took, from number `from` until now.
pub(super) fn log(memory: &File, from: u32) -> Result<Vec<u32>> {
    let count = waits(memory)?.wrapping_sub(from);
    ensure!(count <= LOG_ENTRIES, "the guest has waited {count} times, and remembers {LOG_ENTRIES}");
    let mut bytes = vec![0; LOG_ENTRIES as usize * size_of::<u32>()];
    memory.read_exact_at(&mut bytes, LOG.into()).context("reading the guest's log")?;
    let (entries, _) = bytes.as_chunks();
    let entry = |number: u32| u32::from_le_bytes(entries[(from.wrapping_add(number) % LOG_ENTRIES) as usize]);
    Ok((0..count).map(entry).collect())
}

fn word(memory: &File, at: u32) -> Result<u32> {
    let mut word = [0; size_of::<u32>()];
    memory.read_exact_at(&mut word, at.into()).context("reading the guest's memory")?;
    Ok(u32::from_le_bytes(word))
}

/// Returns the program's bytes.
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static memlane_toucher_code: u8;
        static memlane_toucher_code_end: u8;
    }
    let (start, end) = (&raw const memlane_toucher_code, &raw const memlane_toucher_code_end);
    // SAFETY: both labels lie in one read-only section, in this order, with the program between them.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

// Pages are numbered by a linear congruential generator of full period, whose bits are then mixed by steps that can be
// undone: so each page comes once before any comes again.
global_asm!(
    r#"
    .pushsection .rodata.memlane_toucher, "a", @progbits
    .balign 4
    .global memlane_toucher_code
    .global memlane_toucher_code_end
memlane_toucher_code:
    .long   0x1badb002                  # a Multiboot header
    .long   0x00010000                  # that says where to load the file:
    .long   -(0x1badb002 + 0x00010000)
    .long   {program}
    .long   {program}
    .long   0                           # all of it, and nothing behind it
    .long   0
    .long   {program} + (.Lmemlane_toucher_entry - memlane_toucher_code)

    .code32
.Lmemlane_toucher_entry:
    cli
    mov     dword ptr [{runs}], 1
    xor     esi, esi
.Lmemlane_toucher_next:
    imul    esi, esi, 1664525
    add     esi, 1013904223
    and     esi, dword ptr [{mask}]
    mov     eax, esi
    mov     ecx, dword ptr [{shift}]
    shr     eax, cl
    xor     eax, esi
    imul    eax, eax, 0x9e3779b1
    and     eax, dword ptr [{mask}]
    cmp     eax, dword ptr [{pages}]
    jae     .Lmemlane_toucher_next
    add     eax, dword ptr [{first}]
    shl     eax, 12
    mov     edi, eax

    rdtsc
    mov     ebp, eax
    mov     ebx, edx
    lfence
    mov     ecx, dword ptr [edi]
    lfence
    rdtsc
    sub     eax, ebp
    sbb     edx, ebx
    jz      .Lmemlane_toucher_fits
    mov     eax, 0xffffffff
.Lmemlane_toucher_fits:
    cmp     eax, dword ptr [{threshold}]
    jb      .Lmemlane_toucher_next
    mov     edx, dword ptr [{waits}]
    mov     ecx, edx
    and     ecx, {log_mask}
    mov     dword ptr [ecx * 4 + {log}], eax
    inc     edx
    mov     dword ptr [{waits}], edx
    jmp     .Lmemlane_toucher_next
memlane_toucher_code_end:
    .code64
    .popsection
    "#,
    program = const PROGRAM,
    first = const BLOCK as usize + offset_of!(ProgramBlock, first),
    pages = const BLOCK as usize + offset_of!(ProgramBlock, pages),
    mask = const BLOCK as usize + offset_of!(ProgramBlock, mask),
    shift = const BLOCK as usize + offset_of!(ProgramBlock, shift),
    threshold = const BLOCK as usize + offset_of!(ProgramBlock, threshold),
    runs = const BLOCK as usize + offset_of!(ProgramBlock, runs),
    waits = const BLOCK as usize + offset_of!(ProgramBlock, waits),
    log = const LOG,
    log_mask = const LOG_ENTRIES - 1,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_begins_with_its_header_and_ends_with_its_block() {
        let image = image(64 << 20, 12_345);
        let word = |at: usize| u32::from_le_bytes(image[at..][..4].try_into().expect("four bytes"));
        let header = [0, 4, 8].map(word);
        assert_eq!(header[0], 0x1bad_b002);
        assert_eq!(header.iter().fold(0, |sum: u32, word| sum.wrapping_add(*word)), 0);
        let entry = word(28);
        assert!((PROGRAM + 32..BLOCK).contains(&entry), "{entry:#x}");
        let block = (BLOCK - PROGRAM) as usize;
        assert_eq!(image.len(), block + size_of::<ProgramBlock>());
        assert_eq!([0, 4, 8, 12, 16].map(|field| word(block + field)), [4096, 12_288, 16_383, 7, 12_345]);
    }

    #[test]
    fn every_page_comes_once_in_a_pass() {
        // What the program does, in Rust.
        let (mask, shift) = (0x3fff_u32, 7);
        let mut seen = vec![false; mask as usize + 1];
        let mut state = 0_u32;
        for _ in 0..=mask {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & mask;
            let page = ((state >> shift) ^ state).wrapping_mul(0x9e37_79b1) & mask;
            assert!(!std::mem::replace(&mut seen[page as usize], true), "page {page} comes twice");
        }
    }

    #[test]
    fn a_log_goes_round() {
        let memory = tempfile();
        let waits_at = u64::from(BLOCK) + offset_of!(ProgramBlock, waits) as u64;
        for (number, ticks) in [(LOG_ENTRIES - 1, 7_u32), (0, 8), (1, 9)] {
            memory.write_all_at(&ticks.to_le_bytes(), u64::from(LOG + number * 4)).expect("a write");
        }
        memory.write_all_at(&(LOG_ENTRIES + 2).to_le_bytes(), waits_at).expect("a write");
        assert_eq!(log(&memory, LOG_ENTRIES - 1).expect("a log"), [7, 8, 9]);
        assert!(log(&memory, 1).is_err(), "the oldest is lost");
        assert!(!runs(&memory).expect("memory"));
    }

    fn tempfile() -> File {
        let file = rustix::fs::memfd_create("toucher", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(file);
        file.set_len(LOW_MEMORY as u64).expect("a size");
        file
    }
}
