//! [`Feature`]: features in CPUID, the words that hold them, and their names.

use std::fmt;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;

/// One bit of CPUID that stands for a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feature {
    /// The leaf (EAX on entry).
    pub function: u32,
    /// The subleaf (ECX on entry), 0 where there are none.
    pub index: u32,
    /// The register of the result.
    pub register: Register,
    /// The bit in the register, 0 to 31.
    pub bit: u8,
}

/// A register of a CPUID result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Register {
    /// The register is EAX.
    Eax,
    /// The register is EBX.
    Ebx,
    /// The register is ECX.
    Ecx,
    /// The register is EDX.
    Edx,
}

/// The error for a name that no feature has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no processor feature is called {0:?}; names are those of /proc/cpuinfo, such as avx2 or sha_ni")]
pub struct UnknownFeature(pub String);

impl Feature {
    /// The features that let a guest run guests of its own: VMX and SVM.
    pub const NESTED: [Feature; 2] = [
        Feature { function: 1, index: 0, register: Register::Ecx, bit: 5 },
        Feature { function: 0x8000_0001, index: 0, register: Register::Ecx, bit: 2 },
    ];

    /// Returns the feature's name as `/proc/cpuinfo` spells it, or `None` if this library knows no name for it.
    pub fn name(&self) -> Option<&'static str> {
        NAMES.iter().find(|(feature, _)| feature == self).map(|(_, name)| *name)
    }

    /// Clears the feature in a CPUID entry of its leaf; entries of other leaves are left as they are.
    pub fn hide(&self, entry: &mut kvm_cpuid_entry2) {
        if entry.function == self.function && entry.index == self.index {
            let word = match self.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *word &= !(1 << self.bit);
        }
    }
}

impl FromStr for Feature {
    type Err = UnknownFeature;

    fn from_str(name: &str) -> Result<Self, UnknownFeature> {
        let found = NAMES.iter().find(|(_, known)| *known == name);
        found.map(|(feature, _)| *feature).ok_or_else(|| UnknownFeature(name.to_owned()))
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.name() {
            return f.write_str(name);
        }
        let Self { function, index, register, bit } = self;
        let register = match register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        write!(f, "the feature of CPUID leaf {function:#x}.{index}, {register} bit {bit}")
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

const fn feature(function: u32, index: u32, register: Register, bit: u8) -> Feature {
    Feature { function, index, register, bit }
}

/// The names of features, from the kernel's `cpufeatures.h`, as `/proc/cpuinfo` shows them.
#[rustfmt::skip]
const NAMES: &[(Feature, &str)] = &[
    (feature(1, 0, Ecx, 0), "pni"), (feature(1, 0, Ecx, 1), "pclmulqdq"), (feature(1, 0, Ecx, 3), "monitor"),
    (feature(1, 0, Ecx, 5), "vmx"), (feature(1, 0, Ecx, 9), "ssse3"), (feature(1, 0, Ecx, 12), "fma"),
    (feature(1, 0, Ecx, 13), "cx16"), (feature(1, 0, Ecx, 15), "pdcm"), (feature(1, 0, Ecx, 17), "pcid"),
    (feature(1, 0, Ecx, 19), "sse4_1"), (feature(1, 0, Ecx, 20), "sse4_2"), (feature(1, 0, Ecx, 21), "x2apic"),
    (feature(1, 0, Ecx, 22), "movbe"), (feature(1, 0, Ecx, 23), "popcnt"),
    (feature(1, 0, Ecx, 24), "tsc_deadline_timer"), (feature(1, 0, Ecx, 25), "aes"),
    (feature(1, 0, Ecx, 26), "xsave"), (feature(1, 0, Ecx, 28), "avx"), (feature(1, 0, Ecx, 29), "f16c"),
    (feature(1, 0, Ecx, 30), "rdrand"),
    (feature(1, 0, Edx, 0), "fpu"), (feature(1, 0, Edx, 4), "tsc"), (feature(1, 0, Edx, 5), "msr"),
    (feature(1, 0, Edx, 6), "pae"), (feature(1, 0, Edx, 8), "cx8"), (feature(1, 0, Edx, 9), "apic"),
    (feature(1, 0, Edx, 11), "sep"), (feature(1, 0, Edx, 12), "mtrr"), (feature(1, 0, Edx, 13), "pge"),
    (feature(1, 0, Edx, 15), "cmov"), (feature(1, 0, Edx, 16), "pat"), (feature(1, 0, Edx, 19), "clflush"),
    (feature(1, 0, Edx, 23), "mmx"), (feature(1, 0, Edx, 24), "fxsr"), (feature(1, 0, Edx, 25), "sse"),
    (feature(1, 0, Edx, 26), "sse2"), (feature(1, 0, Edx, 27), "ss"),
    (feature(6, 0, Eax, 2), "arat"),
    (feature(7, 0, Ebx, 0), "fsgsbase"), (feature(7, 0, Ebx, 1), "tsc_adjust"), (feature(7, 0, Ebx, 2), "sgx"),
    (feature(7, 0, Ebx, 3), "bmi1"), (feature(7, 0, Ebx, 4), "hle"), (feature(7, 0, Ebx, 5), "avx2"),
    (feature(7, 0, Ebx, 7), "smep"), (feature(7, 0, Ebx, 8), "bmi2"), (feature(7, 0, Ebx, 9), "erms"),
    (feature(7, 0, Ebx, 10), "invpcid"), (feature(7, 0, Ebx, 11), "rtm"), (feature(7, 0, Ebx, 14), "mpx"),
    (feature(7, 0, Ebx, 16), "avx512f"), (feature(7, 0, Ebx, 17), "avx512dq"), (feature(7, 0, Ebx, 18), "rdseed"),
    (feature(7, 0, Ebx, 19), "adx"), (feature(7, 0, Ebx, 20), "smap"), (feature(7, 0, Ebx, 21), "avx512ifma"),
    (feature(7, 0, Ebx, 23), "clflushopt"), (feature(7, 0, Ebx, 24), "clwb"), (feature(7, 0, Ebx, 28), "avx512cd"),
    (feature(7, 0, Ebx, 29), "sha_ni"), (feature(7, 0, Ebx, 30), "avx512bw"), (feature(7, 0, Ebx, 31), "avx512vl"),
    (feature(7, 0, Ecx, 1), "avx512vbmi"), (feature(7, 0, Ecx, 2), "umip"), (feature(7, 0, Ecx, 3), "pku"),
    (feature(7, 0, Ecx, 5), "waitpkg"), (feature(7, 0, Ecx, 6), "avx512_vbmi2"), (feature(7, 0, Ecx, 7), "user_shstk"),
    (feature(7, 0, Ecx, 8), "gfni"), (feature(7, 0, Ecx, 9), "vaes"), (feature(7, 0, Ecx, 10), "vpclmulqdq"),
    (feature(7, 0, Ecx, 11), "avx512_vnni"), (feature(7, 0, Ecx, 12), "avx512_bitalg"),
    (feature(7, 0, Ecx, 14), "avx512_vpopcntdq"), (feature(7, 0, Ecx, 16), "la57"), (feature(7, 0, Ecx, 22), "rdpid"),
    (feature(7, 0, Ecx, 24), "bus_lock_detect"), (feature(7, 0, Ecx, 25), "cldemote"),
    (feature(7, 0, Ecx, 27), "movdiri"), (feature(7, 0, Ecx, 28), "movdir64b"),
    (feature(7, 0, Edx, 4), "fsrm"), (feature(7, 0, Edx, 8), "avx512_vp2intersect"), (feature(7, 0, Edx, 10), "md_clear"),
    (feature(7, 0, Edx, 14), "serialize"), (feature(7, 0, Edx, 16), "tsxldtrk"), (feature(7, 0, Edx, 20), "ibt"),
    (feature(7, 0, Edx, 22), "amx_bf16"), (feature(7, 0, Edx, 23), "avx512_fp16"), (feature(7, 0, Edx, 24), "amx_tile"),
    (feature(7, 0, Edx, 25), "amx_int8"), (feature(7, 0, Edx, 26), "spec_ctrl"), (feature(7, 0, Edx, 27), "intel_stibp"),
    (feature(7, 0, Edx, 28), "flush_l1d"), (feature(7, 0, Edx, 29), "arch_capabilities"),
    (feature(7, 0, Edx, 30), "core_capabilities"), (feature(7, 0, Edx, 31), "spec_ctrl_ssbd"),
    (feature(7, 1, Eax, 4), "avx_vnni"), (feature(7, 1, Eax, 5), "avx512_bf16"), (feature(7, 1, Eax, 21), "amx_fp16"),
    (feature(7, 1, Eax, 23), "avx_ifma"),
    (feature(0xd, 1, Eax, 0), "xsaveopt"), (feature(0xd, 1, Eax, 1), "xsavec"), (feature(0xd, 1, Eax, 2), "xgetbv1"),
    (feature(0xd, 1, Eax, 3), "xsaves"), (feature(0xd, 1, Eax, 4), "xfd"),
    (feature(0x4000_0001, 0, Eax, 0), "kvmclock"), (feature(0x4000_0001, 0, Eax, 3), "kvmclock2"),
    (feature(0x4000_0001, 0, Eax, 4), "kvm_asyncpf"), (feature(0x4000_0001, 0, Eax, 5), "kvm_steal_time"),
    (feature(0x4000_0001, 0, Eax, 6), "kvm_pv_eoi"), (feature(0x4000_0001, 0, Eax, 7), "kvm_pv_unhalt"),
    (feature(0x4000_0001, 0, Eax, 9), "kvm_pv_tlb_flush"), (feature(0x4000_0001, 0, Eax, 11), "kvm_pv_ipi"),
    (feature(0x4000_0001, 0, Eax, 12), "kvm_poll_control"), (feature(0x4000_0001, 0, Eax, 13), "kvm_sched_yield"),
    (feature(0x4000_0001, 0, Eax, 14), "kvm_asyncpf_int"), (feature(0x4000_0001, 0, Eax, 15), "kvm_msi_ext_dest_id"),
    (feature(0x4000_0001, 0, Eax, 24), "kvmclock_stable"),
    (feature(0x8000_0001, 0, Ecx, 0), "lahf_lm"), (feature(0x8000_0001, 0, Ecx, 2), "svm"),
    (feature(0x8000_0001, 0, Ecx, 4), "cr8_legacy"), (feature(0x8000_0001, 0, Ecx, 5), "abm"),
    (feature(0x8000_0001, 0, Ecx, 6), "sse4a"), (feature(0x8000_0001, 0, Ecx, 7), "misalignsse"),
    (feature(0x8000_0001, 0, Ecx, 8), "3dnowprefetch"), (feature(0x8000_0001, 0, Ecx, 9), "osvw"),
    (feature(0x8000_0001, 0, Ecx, 11), "xop"), (feature(0x8000_0001, 0, Ecx, 16), "fma4"),
    (feature(0x8000_0001, 0, Ecx, 21), "tbm"), (feature(0x8000_0001, 0, Ecx, 22), "topoext"),
    (feature(0x8000_0001, 0, Ecx, 23), "perfctr_core"),
    (feature(0x8000_0001, 0, Edx, 11), "syscall"), (feature(0x8000_0001, 0, Edx, 20), "nx"),
    (feature(0x8000_0001, 0, Edx, 22), "mmxext"), (feature(0x8000_0001, 0, Edx, 25), "fxsr_opt"),
    (feature(0x8000_0001, 0, Edx, 26), "pdpe1gb"), (feature(0x8000_0001, 0, Edx, 27), "rdtscp"),
    (feature(0x8000_0001, 0, Edx, 29), "lm"),
    (feature(0x8000_0007, 0, Edx, 8), "constant_tsc"),
    (feature(0x8000_0008, 0, Ebx, 0), "clzero"), (feature(0x8000_0008, 0, Ebx, 2), "xsaveerptr"),
    (feature(0x8000_0008, 0, Ebx, 9), "wbnoinvd"), (feature(0x8000_0008, 0, Ebx, 12), "amd_ibpb"),
    (feature(0x8000_0008, 0, Ebx, 14), "amd_ibrs"), (feature(0x8000_0008, 0, Ebx, 15), "amd_stibp"),
    (feature(0x8000_0008, 0, Ebx, 17), "amd_stibp_always_on"), (feature(0x8000_0008, 0, Ebx, 24), "amd_ssbd"),
    (feature(0x8000_0008, 0, Ebx, 25), "virt_ssbd"), (feature(0x8000_0008, 0, Ebx, 26), "amd_ssb_no"),
    (feature(0x8000_0008, 0, Ebx, 28), "amd_psfd"),
];

#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = (Feature, &'static str)> {
    NAMES.iter().copied()
}
