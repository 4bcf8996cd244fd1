//! The guest: vCPUs that read and write pages, some of them more often than others.

use std::time::Duration;

use crate::event::Event;
use crate::host::Host;
use crate::memory::Access;
use crate::vmm::{State, Stun};
use crate::world::World;

/// One vCPU.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vcpu {
    /// It has run until this time, or waits until then for a write to be let go.
    until: Duration,
    /// It waits for this page, in this VMM.
    pub waits_for: Option<(usize, u64)>,
}

/// Where a vCPU stands after an access.
enum Step {
    GoesOn(Duration),
    Waits,
}

impl World {
    /// Has the vCPUs run until the next tick, where the guest runs.
    pub(crate) fn guest_runs(&mut self) {
        let busy = !self.hosts.iter().all(Host::takes_orders);
        let tick = if busy { self.plan.tick } else { 20 * self.plan.tick };
        let now = self.clock.now();
        self.clock.after(tick, Event::Guest);
        let Some(vmm) = self.vmms.iter().position(|vmm| vmm.state == State::Running) else { return };
        for vcpu in 0..self.vcpus.len() {
            self.vcpu_runs(vcpu, vmm, now, now + tick);
        }
    }

    fn vcpu_runs(&mut self, vcpu: usize, vmm: usize, now: Duration, end: Duration) {
        match self.vcpus[vcpu].waits_for {
            Some((there, page)) if there == vmm => match self.vmms[vmm].memory.access(page) {
                Access::Waits => return,
                Access::Version(_) => self.vcpus[vcpu].waits_for = None,
            },
            _ => self.vcpus[vcpu].waits_for = None,
        }
        let mut at = self.vcpus[vcpu].until.max(now);
        while at < end && self.violation.is_none() {
            let page = self.pick_page();
            let writes = self.dice.below(100) < self.plan.write_percent;
            match self.access(vmm, page, writes, at) {
                Step::GoesOn(let_go) => at = let_go + self.plan.access_time,
                Step::Waits => {
                    self.vcpus[vcpu].waits_for = Some((vmm, page));
                    self.page_fault(vmm, page);
                    break;
                }
            }
        }
        self.vcpus[vcpu].until = at;
    }

    /// Returns a page that the guest is to access: of its hot ones in most cases.
    fn pick_page(&mut self) -> u64 {
        let hot = self.dice.below(100) < self.plan.hot_percent;
        let beyond = if hot { self.plan.hot_pages } else { self.plan.used_pages };
        let place = self.dice.below(beyond);
        // Hot pages lie apart from each other.
        place * self.plan.stride % self.plan.pages
    }

    fn access(&mut self, vmm: usize, page: u64, writes: bool, at: Duration) -> Step {
        match self.vmms[vmm].memory.access(page) {
            Access::Waits => return Step::Waits,
            Access::Version(found) => self.check_read(vmm, page, found),
        }
        if !writes {
            return Step::GoesOn(at);
        }
        let mut let_go = at;
        if self.vmms[vmm].memory.is_protected(page)
            && let Some(Stun { bucket, around }) = &mut self.vmms[vmm].stun
        {
            let pages = around.on_write(at);
            let wait = bucket.take(pages, at);
            let_go += wait;
            around.on_release(wait, let_go);
        }
        self.write_page(vmm, page);
        Step::GoesOn(let_go)
    }

    /// Writes the next version of a page.
    pub(crate) fn write_page(&mut self, vmm: usize, page: u64) {
        let newest = &mut self.truth[page as usize];
        *newest += 1;
        self.vmms[vmm].memory.write(page, *newest);
    }

    /// Lets the vCPUs go on that waited for a page, at the next tick.
    pub(crate) fn is_waited_for(&self, vmm: usize, page: u64) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.waits_for == Some((vmm, page)))
    }
}
