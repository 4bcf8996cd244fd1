//! Showing a guest's memory to a virtual machine as KVM memory slots.

use std::io;
use std::ops::Range;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use memlane_protocol::PAGE_SIZE;

use super::GuestRam;
use crate::error::RamError;

/// The number of pages of the largest KVM memory slot; the kernel's limit is just under twice that.
const SLOT_PAGES: u64 = 1 << 30;

/// A KVM memory slot over consecutive pages of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySlot {
    pub(crate) slot: u32,
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    pub(crate) flags: u32,
}

impl MemorySlot {
    /// Returns KVM's number of the slot.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Returns the pages that the slot shows to the guest.
    pub fn pages(&self) -> Range<u64> {
        self.first_page..self.first_page + self.pages
    }
}

impl GuestRam {
    /// Shows the memory to a virtual machine (`KVM_SET_USER_MEMORY_REGION`): each region becomes a slot, or
    /// several if it is larger than KVM's largest slot. Slots are numbered from 0, and have these `flags`
    /// (`KVM_MEM_*`).
    ///
    /// # Errors
    ///
    /// [`RamError::Kernel`] if KVM refuses a slot; those before it stay.
    ///
    /// # Safety
    ///
    /// The memory must outlive the virtual machine, which writes it from now on.
    pub unsafe fn register(&self, vm: &VmFd, flags: u32) -> Result<Vec<MemorySlot>, RamError> {
        let mut slots = Vec::new();
        for mapped in &self.mapped {
            let mut first_page = mapped.pages.start;
            while first_page < mapped.pages.end {
                let pages = SLOT_PAGES.min(mapped.pages.end - first_page);
                slots.push(MemorySlot { slot: slots.len() as u32, first_page, pages, flags });
                first_page += pages;
            }
        }
        for slot in &slots {
            self.set_slot(vm, slot, slot.flags).map_err(|source| RamError::Kernel {
                index: self.region_of(slot.first_page).unwrap_or(0),
                doing: "show it to the virtual machine (KVM_SET_USER_MEMORY_REGION)",
                source,
            })?;
        }
        Ok(slots)
    }

    /// Sets a slot that [`register`](Self::register) made, anew or with other flags.
    pub(crate) fn set_slot(&self, vm: &VmFd, slot: &MemorySlot, flags: u32) -> io::Result<()> {
        let (Some(address), Some(host)) = (
            self.address_of(slot.first_page),
            self.slices(slot.pages()).next().filter(|host| host.len as u64 == slot.pages * PAGE_SIZE),
        ) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: address,
            memory_size: slot.pages * PAGE_SIZE,
            userspace_addr: host.ptr as u64,
        };
        // SAFETY: the range lies within a mapping of ours, and the caller of `register`, which made the slot,
        // promised that the mapping outlives the virtual machine.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}
