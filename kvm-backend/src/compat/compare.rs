//! Whether one processor has all the features that another has.

use memlane_protocol::wire::machine::CpuidEntry;

use super::cpuid::Register::{Eax, Ebx, Ecx, Edx};
use super::cpuid::{Feature, Register};
use super::incompatible::Incompatible;

/// The words that are made of feature bits, each with the bits that say something else: the state of CR4 (OSXSAVE,
/// OSPKE), whether there is a hypervisor, or topology (HTT, CMP_LEGACY).
const WORDS: [(u32, u32, Register, u32); 20] = [
    (0x1, 0, Ecx, 1 << 27 | 1 << 31),
    (0x1, 0, Edx, 1 << 28),
    (0x6, 0, Eax, 0),
    (0x7, 0, Ebx, 0),
    (0x7, 0, Ecx, 1 << 4),
    (0x7, 0, Edx, 0),
    (0x7, 1, Eax, 0),
    (0x7, 1, Ebx, 0),
    (0x7, 1, Ecx, 0),
    (0x7, 1, Edx, 0),
    (0x7, 2, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0x4000_0001, 0, Eax, 0),
    (0x8000_0001, 0, Ecx, 1 << 1),
    (0x8000_0001, 0, Edx, 0),
    (0x8000_0007, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_0021, 0, Eax, 0),
    (0x8000_0021, 0, Ecx, 0),
];

/// Returns the features that `guest` was given and `host` does not have, and what else makes the processors
/// incompatible.
pub(super) fn compare(guest: &[CpuidEntry], host: &[CpuidEntry]) -> Vec<Incompatible> {
    let mut found = Vec::new();
    let (ours, theirs) = (vendor(guest), vendor(host));
    if ours != theirs {
        found.push(Incompatible::Vendor { guest: ours, host: theirs });
    }
    for (function, index, register, ignored) in WORDS {
        let has = word(guest, function, index, register);
        let nested = |bit| Feature::NESTED.contains(&Feature { function, index, register, bit });
        let lacks = has & !word(host, function, index, register) & !ignored;
        for bit in 0..32u8 {
            let feature = Feature { function, index, register, bit };
            if has >> bit & 1 == 1 && nested(bit) {
                found.push(Incompatible::Nested(feature));
            } else if lacks >> bit & 1 == 1 {
                found.push(Incompatible::Cpuid(feature));
            }
        }
    }
    found
}

/// Returns a word of CPUID; 0 if it has no such leaf.
fn word(entries: &[CpuidEntry], function: u32, index: u32, register: Register) -> u32 {
    let found = entries.iter().find(|e| e.function.get() == function && e.index.get() == index);
    found.map_or(0, |entry| match register {
        Register::Eax => entry.eax.get(),
        Register::Ebx => entry.ebx.get(),
        Register::Ecx => entry.ecx.get(),
        Register::Edx => entry.edx.get(),
    })
}

/// Returns the maker of a processor, as CPUID spells it.
fn vendor(entries: &[CpuidEntry]) -> String {
    let bytes: Vec<u8> = [Register::Ebx, Register::Edx, Register::Ecx]
        .into_iter()
        .flat_map(|register| word(entries, 0, 0, register).to_le_bytes())
        .filter(u8::is_ascii_graphic)
        .collect();
    String::from_utf8(bytes).expect("printable ASCII is UTF-8")
}

#[cfg(test)]
pub(super) fn is_compared(feature: Feature) -> bool {
    WORDS.iter().any(|(function, index, register, ignored)| {
        (*function, *index, *register) == (feature.function, feature.index, feature.register)
            && ignored >> feature.bit & 1 == 0
    })
}
