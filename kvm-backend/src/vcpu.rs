//! [`VcpuState`]: everything that KVM knows about one virtual CPU, read and written in the order that KVM needs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use memlane_protocol::wire::machine::MAX_CPUID_ENTRIES;
use zerocopy::IntoBytes;

use crate::clock::Moment;
use crate::error::StateError;

/// The MSR of the time-stamp counter, which is moved as [`VcpuState::tsc`] and never as a plain MSR.
const MSR_IA32_TSC: u32 = 0x10;
/// The MSR of the deadline timer, which means something only once the LAPIC's timer mode and the TSC are in place.
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The number of MSRs in one `KVM_GET_MSRS` or `KVM_SET_MSRS`.
const MSRS_AT_ONCE: usize = 256;
/// By how many parts per million two TSC frequencies may differ before KVM takes them for different (its module
/// parameter `tsc_tolerance_ppm`).
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// What this host's KVM can save and restore of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The MSRs that can be read and written back, in ascending order, without the TSC itself.
    pub msrs: Vec<u32>,
    /// The size of the XSAVE area in bytes (`KVM_CAP_XSAVE2`).
    pub xsave_bytes: usize,
    /// Whether KVM has extended control registers (`KVM_CAP_XCRS`).
    pub xcrs: bool,
    /// Whether the virtual machine has the in-kernel interrupt controllers.
    pub irqchip: bool,
    /// Whether a guest's TSC may run at another frequency than the host's (`KVM_CAP_TSC_CONTROL`).
    pub tsc_control: bool,
    /// The host's TSC frequency in kHz.
    pub tsc_khz: u32,
}

/// The whole state of a vCPU, as raw kernel structures.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuState {
    /// The answers of CPUID to the guest.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The general registers.
    pub regs: kvm_regs,
    /// The segments, control registers, EFER and APIC base.
    pub sregs: kvm_sregs,
    /// The FPU, SSE, AVX and other state that XSAVE covers: [`Capabilities::xsave_bytes`] bytes.
    pub xsave: Vec<u8>,
    /// XCR0, if the host has it.
    pub xcrs: Option<kvm_xcrs>,
    /// The debug registers.
    pub debugregs: kvm_debugregs,
    /// The pending exceptions, interrupts and NMIs.
    pub events: kvm_vcpu_events,
    /// Whether the vCPU is runnable, halted or waiting for INIT.
    pub mp_state: kvm_mp_state,
    /// The model-specific registers, without the TSC.
    pub msrs: Vec<kvm_msr_entry>,
    /// The local APIC, if it is in the kernel.
    pub lapic: Option<kvm_lapic_state>,
    /// The guest's time-stamp counter at the [`Moment`] of capture.
    pub tsc: u64,
    /// The frequency of that counter in kHz.
    pub tsc_khz: u32,
}

impl Capabilities {
    /// Finds the capabilities out by asking `vcpu`, which must have its CPUID and must not have run yet: each MSR
    /// that `KVM_GET_MSR_INDEX_LIST` names is read and written back. `irqchip` says whether `vm` has the in-kernel
    /// interrupt controllers.
    ///
    /// # Errors
    ///
    /// [`StateError::Kvm`] if KVM does not answer.
    pub fn probe(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, irqchip: bool) -> Result<Self, StateError> {
        let listed =
            kvm.get_msr_index_list().map_err(StateError::kvm("list MSRs (KVM_GET_MSR_INDEX_LIST)"))?;
        let mut msrs: Vec<u32> =
            listed.as_slice().iter().copied().filter(|msr| restorable(vcpu, *msr)).collect();
        msrs.sort_unstable();
        msrs.dedup();
        let xsave_bytes = match vm.check_extension_int(Cap::Xsave2) {
            bytes if bytes > 0 => bytes as usize,
            _ => size_of::<kvm_xsave>(),
        };
        Ok(Self {
            msrs,
            xsave_bytes,
            xcrs: kvm.check_extension(Cap::Xcrs),
            irqchip,
            tsc_control: kvm.check_extension(Cap::TscControl),
            tsc_khz: vcpu
                .get_tsc_khz()
                .map_err(StateError::kvm("read the TSC frequency (KVM_GET_TSC_KHZ)"))?,
        })
    }
}

impl VcpuState {
    /// Reads the whole state. The vCPU must be paused, with its port I/O complete (see [`complete_io`]). `at` is
    /// the moment for which the TSC's value is given, and must be the same for all vCPUs of a guest.
    ///
    /// # Errors
    ///
    /// [`StateError`] says what KVM refused.
    pub fn capture(vcpu: &VcpuFd, host: &Capabilities, at: &Moment) -> Result<Self, StateError> {
        // KVM_GET_MP_STATE first: it takes in pending INITs and SIPIs, which changes registers.
        let mp_state =
            vcpu.get_mp_state().map_err(StateError::kvm("read the run state (KVM_GET_MP_STATE)"))?;
        let regs = vcpu.get_regs().map_err(StateError::kvm("read registers (KVM_GET_REGS)"))?;
        let sregs = vcpu.get_sregs().map_err(StateError::kvm("read special registers (KVM_GET_SREGS)"))?;
        let xcrs = match host.xcrs {
            true => Some(vcpu.get_xcrs().map_err(StateError::kvm("read XCR0 (KVM_GET_XCRS)"))?),
            false => None,
        };
        let xsave = read_xsave(vcpu, host.xsave_bytes)?;
        let debugregs =
            vcpu.get_debug_regs().map_err(StateError::kvm("read debug registers (KVM_GET_DEBUGREGS)"))?;
        // MSRs before the LAPIC: a deadline timer that fires in between is then seen twice rather
        // than never.
        let msrs = read_msrs(vcpu, &host.msrs)?;
        let lapic = match host.irqchip {
            true => Some(vcpu.get_lapic().map_err(StateError::kvm("read the local APIC (KVM_GET_LAPIC)"))?),
            false => None,
        };
        let events =
            vcpu.get_vcpu_events().map_err(StateError::kvm("read pending events (KVM_GET_VCPU_EVENTS)"))?;
        let tsc_khz =
            vcpu.get_tsc_khz().map_err(StateError::kvm("read the TSC frequency (KVM_GET_TSC_KHZ)"))?;
        let cpuid = vcpu
            .get_cpuid2(MAX_CPUID_ENTRIES)
            .map_err(StateError::kvm("read CPUID (KVM_GET_CPUID2)"))?
            .as_slice()
            .to_vec();
        Ok(Self {
            cpuid,
            regs,
            sregs,
            xsave,
            xcrs,
            debugregs,
            events,
            mp_state,
            msrs,
            lapic,
            tsc: guest_tsc(vcpu, host, tsc_khz, at)?,
            tsc_khz,
        })
    }

    /// Writes the whole state into a vCPU that has not run yet. `at` is now, and `passed` is the time since the
    /// capture, by which the guest's TSC is advanced; both must be the same for all vCPUs of a guest.
    ///
    /// # Errors
    ///
    /// [`StateError`] says what KVM refused; the vCPU must not run then.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        host: &Capabilities,
        at: &Moment,
        passed: Duration,
    ) -> Result<(), StateError> {
        // CPUID first: it decides which bits, MSRs and components the rest may set.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany("CPUID entries"))?;
        vcpu.set_cpuid2(&cpuid).map_err(StateError::kvm("set CPUID (KVM_SET_CPUID2)"))?;
        let scaled = !same_frequency(self.tsc_khz, host.tsc_khz);
        if scaled {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(StateError::kvm("set the TSC frequency (KVM_SET_TSC_KHZ)"))?;
        }
        // Special registers switch the LAPIC on and choose its mode, so they come before it;
        // general registers clear pending exceptions, so they come before the events.
        vcpu.set_sregs(&self.sregs).map_err(StateError::kvm("set special registers (KVM_SET_SREGS)"))?;
        vcpu.set_regs(&self.regs).map_err(StateError::kvm("set registers (KVM_SET_REGS)"))?;
        self.write_xsave(vcpu, host.xsave_bytes)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(StateError::kvm("set XCR0 (KVM_SET_XCRS)"))?;
        }
        vcpu.set_debug_regs(&self.debugregs)
            .map_err(StateError::kvm("set debug registers (KVM_SET_DEBUGREGS)"))?;
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(StateError::kvm("set the local APIC (KVM_SET_LAPIC)"))?;
        }
        let (deadline, msrs): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == MSR_IA32_TSC_DEADLINE);
        write_msrs(vcpu, &msrs)?;
        let ticks = passed.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        let tsc = self.tsc.wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX));
        set_guest_tsc(vcpu, tsc, scaled, at)?;
        write_msrs(vcpu, &deadline)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(StateError::kvm("set pending events (KVM_SET_VCPU_EVENTS)"))?;
        vcpu.set_mp_state(self.mp_state).map_err(StateError::kvm("set the run state (KVM_SET_MP_STATE)"))
    }

    /// Writes the XSAVE area (`KVM_SET_XSAVE`).
    fn write_xsave(&self, vcpu: &VcpuFd, host_bytes: usize) -> Result<(), StateError> {
        let words: Vec<u32> = self
            .xsave
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("chunks have four bytes")))
            .collect();
        let fixed = size_of::<kvm_xsave>() / 4;
        if self.xsave.len() > host_bytes || words.len() < fixed {
            return Err(StateError::Length {
                what: "XSAVE area",
                found: self.xsave.len(),
                expected: host_bytes,
            });
        }
        let mut area = Xsave::new((host_bytes / 4).saturating_sub(fixed))
            .map_err(|_| StateError::TooMany("words of XSAVE"))?;
        area.as_mut_slice()[..words.len() - fixed].copy_from_slice(&words[fixed..]);
        // SAFETY: only the fixed part is written; the length field, on which the wrapper relies, stays.
        unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(&words[..fixed]);
        // SAFETY: the area has as many bytes as KVM_CAP_XSAVE2 says that the kernel reads.
        unsafe { vcpu.set_xsave2(&area) }.map_err(StateError::kvm("set the FPU (KVM_SET_XSAVE)"))
    }
}

/// Lets KVM finish a port or memory access that it has reported to user space and not yet retired: it enters the
/// guest without running a single instruction of it (`KVM_RUN` with `immediate_exit`).
///
/// It must be called on the vCPU's own thread before the vCPU's state is captured.
///
/// # Errors
///
/// [`StateError::PendingExit`] if the vCPU left the guest for another reason, and [`StateError::Kvm`].
pub fn complete_io(vcpu: &mut VcpuFd) -> Result<(), StateError> {
    vcpu.set_kvm_immediate_exit(1);
    let unfinished = match vcpu.run() {
        Ok(_) => Some(StateError::PendingExit),
        Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => None,
        Err(error) => Some(StateError::kvm("complete port I/O (KVM_RUN)")(error)),
    };
    vcpu.set_kvm_immediate_exit(0);
    unfinished.map_or(Ok(()), Err)
}

/// Returns by how many ticks the guest's TSC is ahead of the host's, modulo 2^64 (`KVM_VCPU_TSC_OFFSET`); `None`
/// where KVM does not tell.
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    // SAFETY: the kernel writes one u64 to the address given (Documentation/virt/kvm/devices/vcpu.rst).
    unsafe { tsc_attribute::<GET_DEVICE_ATTR>(vcpu, &raw mut offset) }.ok()?;
    Some(offset)
}

/// Returns whether KVM takes two TSC frequencies, in kHz, for the same.
pub fn same_frequency(guest_khz: u32, host_khz: u32) -> bool {
    u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 <= u64::from(guest_khz) * TSC_TOLERANCE_PPM
}

const SET_DEVICE_ATTR: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<kvm_device_attr>(0xae, 0xe1);
const GET_DEVICE_ATTR: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<kvm_device_attr>(0xae, 0xe2);

/// Sets or reads the TSC offset (`kvm-ioctls` has device attributes of a vCPU on arm64 only).
///
/// # Safety
///
/// `OPCODE` must be one of the two above, and `value` must be valid for the access that it makes.
unsafe fn tsc_attribute<const OPCODE: rustix::ioctl::Opcode>(
    vcpu: &VcpuFd,
    value: *mut u64,
) -> io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value.expose_provenance() as u64,
    };
    // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: the opcode takes a kvm_device_attr, and the caller vouches for the address in it.
    Ok(unsafe { rustix::ioctl::ioctl(fd, rustix::ioctl::Setter::<OPCODE, _>::new(attribute)) }?)
}

/// Returns the guest's TSC at a moment.
fn guest_tsc(vcpu: &VcpuFd, host: &Capabilities, guest_khz: u32, at: &Moment) -> Result<u64, StateError> {
    match tsc_offset(vcpu) {
        // The offset is exact, and equally so for all vCPUs, which keeps their counters in step.
        Some(offset) if same_frequency(guest_khz, host.tsc_khz) => Ok(at.tsc.wrapping_add(offset)),
        _ => Ok(read_msrs(vcpu, &[MSR_IA32_TSC])?.first().map_or(0, |msr| msr.data)),
    }
}

/// Sets the guest's TSC to the value that it has at a moment.
fn set_guest_tsc(vcpu: &VcpuFd, tsc: u64, scaled: bool, at: &Moment) -> Result<(), StateError> {
    let mut offset = tsc.wrapping_sub(at.tsc);
    // SAFETY: the kernel reads one u64 from the address given.
    if !scaled && unsafe { tsc_attribute::<SET_DEVICE_ATTR>(vcpu, &raw mut offset) }.is_ok() {
        return Ok(());
    }
    write_msrs(vcpu, &[&kvm_msr_entry { index: MSR_IA32_TSC, data: tsc, ..Default::default() }])
}

/// Returns whether an MSR can be read and written back.
fn restorable(vcpu: &VcpuFd, index: u32) -> bool {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else { return false };
    index != MSR_IA32_TSC && vcpu.get_msrs(&mut msrs) == Ok(1) && vcpu.set_msrs(&msrs) == Ok(1)
}

/// Reads MSRs (`KVM_GET_MSRS`).
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut found = Vec::with_capacity(indices.len());
    for some in indices.chunks(MSRS_AT_ONCE) {
        let asked: Vec<_> =
            some.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&asked).map_err(|_| StateError::TooMany("MSRs"))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(StateError::kvm("read MSRs (KVM_GET_MSRS)"))?;
        if let Some(refused) = some.get(read) {
            return Err(StateError::Msr { doing: "read", msr: *refused });
        }
        found.extend_from_slice(msrs.as_slice());
    }
    Ok(found)
}

/// Writes MSRs (`KVM_SET_MSRS`).
fn write_msrs(vcpu: &VcpuFd, entries: &[&kvm_msr_entry]) -> Result<(), StateError> {
    for some in entries.chunks(MSRS_AT_ONCE) {
        let values: Vec<_> = some.iter().map(|entry| **entry).collect();
        let msrs = Msrs::from_entries(&values).map_err(|_| StateError::TooMany("MSRs"))?;
        let written = vcpu.set_msrs(&msrs).map_err(StateError::kvm("set MSRs (KVM_SET_MSRS)"))?;
        if let Some(refused) = some.get(written) {
            return Err(StateError::Msr { doing: "set", msr: refused.index });
        }
    }
    Ok(())
}

/// Reads the XSAVE area (`KVM_GET_XSAVE`, or `KVM_GET_XSAVE2` if it is longer).
fn read_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, StateError> {
    let fixed = size_of::<kvm_xsave>();
    let what = "read the FPU (KVM_GET_XSAVE)";
    if bytes <= fixed {
        return Ok(vcpu.get_xsave().map_err(StateError::kvm(what))?.region.as_bytes().to_vec());
    }
    let mut area = Xsave::new((bytes - fixed) / 4).map_err(|_| StateError::TooMany("words of XSAVE"))?;
    // SAFETY: the area has as many bytes as KVM_CAP_XSAVE2 says that the kernel writes.
    unsafe { vcpu.get_xsave2(&mut area) }.map_err(StateError::kvm(what))?;
    let mut out = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    out.extend_from_slice(area.as_slice().as_bytes());
    Ok(out)
}
