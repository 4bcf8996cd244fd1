//! A guest without KVM: the same steps, done by threads of this process in the same memory.
//!
//! It is for machines that have no /dev/kvm. Pausing it, its state, and what it reports are like
//! those of a virtual machine, but nothing of a processor is moved.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memlane_kvm::compat::{Program, describe_process};
use memlane_kvm::ram::GuestRam;
use memlane_kvm::state::{MAX_PASSED, SectionWriter, Sections};
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::machine::Machine;
use rustix::time::ClockId;

use super::block::READS_PER_COUNT;
use super::clock::{ClockReading, clock};
use super::{ControlBlock, GuestLayout, GuestMachine};
use crate::gate::Gate;
use crate::workload::{READ_FACTOR, SLOTS, Stepper, Workload};

/// The frequency of the guest's clock, in kHz: it ticks in nanoseconds.
pub const KHZ: u32 = 1_000_000;
/// The longest sleep of a thread before it looks at the clock again, whatever its deadline is.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The number of steps or reads between two looks at the gate.
const BURST: u64 = 64;
const _: () = assert!(READS_PER_COUNT.is_multiple_of(BURST));

mod tag {
    pub(crate) const CLOCKS: u16 = 128;
    pub(crate) const THREAD: u16 = 129;
    pub(crate) const OWN: u16 = 130;
}

/// Threads that write and read the guest's memory.
pub struct ProcessGuest {
    program: Program,
    workload: Workload,
    layout: GuestLayout,
    clock: Arc<ProcessClock>,
    gate: Arc<Gate>,
    steppers: Vec<Arc<Mutex<ProcessRegisters>>>,
    threads: Vec<JoinHandle<()>>,
}

/// A clock that counts the nanoseconds of `CLOCK_MONOTONIC` and an offset, which moves with the guest.
#[derive(Debug, Default)]
struct ProcessClock {
    offset: AtomicU64,
}

/// The values that a virtual machine keeps in registers.
struct ProcessRegisters {
    stepper: Stepper,
    deadline: u64,
    /// The time when the clock was last read; `None` before the first step and after a move, when the deadline tells
    /// what was missed.
    last: Option<u64>,
    /// The number of steps left in this period.
    left: u64,
}

impl ProcessGuest {
    /// Makes the threads, which are paused.
    pub fn new(
        program: &Program,
        workload: &Workload,
        layout: &GuestLayout,
        ram: &Arc<GuestRam>,
    ) -> Result<Self, String> {
        let vcpus = layout.vcpus();
        let mut guest = Self {
            program: program.clone(),
            workload: workload.clone(),
            layout: layout.clone(),
            clock: Arc::default(),
            gate: Arc::new(Gate::closed(vcpus.into())),
            steppers: Vec::new(),
            threads: Vec::new(),
        };
        for vcpu in 0..vcpus {
            let stepper = layout.stepper(workload, vcpu);
            let progress =
                Arc::new(Mutex::new(ProcessRegisters { stepper, deadline: 0, last: None, left: 0 }));
            guest.steppers.push(Arc::clone(&progress));
            let (gate, clock) = (Arc::clone(&guest.gate), Arc::clone(&guest.clock));
            let (ram, layout) = (Arc::clone(ram), layout.clone());
            let run = move || {
                // Sleeps would be rounded up by 50 µs; nothing is wrong if they are.
                let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
                let block = ControlBlock::of(&ram, &layout, vcpu);
                let part = WorkingPart::new(&ram, &layout, vcpu);
                gate.leave_after(|| {
                    while gate.pass() {
                        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
                        while gate.is_open() {
                            match layout.is_reader(vcpu) {
                                true => progress.read(block, &part),
                                false => progress.run(block, &part, &gate, &clock),
                            }
                        }
                    }
                    None
                });
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{vcpu}")).spawn(run);
            guest.threads.push(thread.map_err(|error| format!("cannot start a thread: {error}"))?);
        }
        Ok(guest)
    }
}

impl GuestMachine for ProcessGuest {
    fn machine(&self) -> Machine {
        describe_process(&self.program)
    }

    fn clock(&self) -> ClockReading {
        let monotonic = clock(ClockId::Monotonic);
        let ticks = monotonic.wrapping_add(self.clock.offset.load(Ordering::Relaxed));
        ClockReading { ticks, khz: KHZ, realtime: clock(ClockId::Realtime), monotonic }
    }

    fn stops_anywhere(&self) -> bool {
        false
    }

    fn image(&self) -> BTreeMap<u64, [u64; SLOTS]> {
        BTreeMap::new()
    }

    fn pause(&self) -> Result<(), String> {
        self.gate.close(|| ())
    }

    fn resume(&self) -> Result<(), String> {
        self.gate.open()
    }

    fn save(&self, own: Vec<u8>) -> Result<Vec<u8>, String> {
        let mut out = SectionWriter::new();
        let now = self.clock();
        out.put(tag::CLOCKS, 0, &[now.ticks, now.realtime]);
        for (index, progress) in (0..).zip(&self.steppers) {
            let progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
            let [random, done] = progress.stepper.position();
            let last = progress.last.unwrap_or(now.ticks);
            out.put(tag::THREAD, index, &[random, done, progress.deadline, last, progress.left]);
        }
        out.put(tag::OWN, 0, own.as_slice());
        Ok(out.finish())
    }

    fn load(&self, state: &[u8]) -> Result<Vec<u8>, String> {
        let text = |error: memlane_kvm::state::StateError| error.to_string();
        let mut sections = Sections::decode(state).map_err(text)?;
        let [ticks, realtime] = sections.take::<[u64; 2]>(tag::CLOCKS, 0, "clocks").map_err(text)?;
        let mut loaded = Vec::new();
        for index in 0..self.layout.vcpus() {
            let [random, done, deadline, last, left] =
                sections.take::<[u64; 5]>(tag::THREAD, index, "progress of a thread").map_err(text)?;
            let fresh = self.layout.stepper(&self.workload, index);
            let stepper = fresh.at([random, done]).ok_or("the state has a generator that cannot be")?;
            loaded.push(ProcessRegisters { stepper, deadline, last: Some(last), left });
        }
        let own = sections.bytes(tag::OWN, 0, "data of the VMM").map_err(text)?.to_vec();
        sections.end().map_err(text)?;

        let passed = clock(ClockId::Realtime).saturating_sub(realtime).min(MAX_PASSED.as_nanos() as u64);
        let offset = ticks.wrapping_add(passed).wrapping_sub(clock(ClockId::Monotonic));
        self.clock.offset.store(offset, Ordering::Relaxed);
        for (progress, loaded) in self.steppers.iter().zip(loaded) {
            *progress.lock().unwrap_or_else(PoisonError::into_inner) = loaded;
        }
        Ok(own)
    }

    fn failure(&self, patience: Duration) -> Option<String> {
        self.gate.failure(patience)
    }
}

impl Drop for ProcessGuest {
    fn drop(&mut self) {
        self.gate.end(|| ());
        for thread in self.threads.drain(..) {
            // A panic has been reported by its hook.
            let _ = thread.join();
        }
    }
}

impl ProcessClock {
    fn now(&self) -> u64 {
        clock(ClockId::Monotonic).wrapping_add(self.offset.load(Ordering::Relaxed))
    }
}

impl ProcessRegisters {
    /// Does a few steps, or sleeps. It does the same as the guest code, piece by piece. As there, a number that comes
    /// with a moved guest can at worst be wrong.
    fn run(&mut self, block: &ControlBlock, part: &WorkingPart<'_>, gate: &Gate, clock: &ProcessClock) {
        let threshold = block.threshold.load(Ordering::Relaxed);
        let period = block.period.load(Ordering::Relaxed);
        let mut last = *self.last.get_or_insert_with(|| clock.now());
        if self.left == 0 && period != 0 {
            if self.deadline <= last {
                self.deadline = self.deadline.saturating_add(period).max(last);
                block.deadline.store(self.deadline, Ordering::Relaxed);
            }
            let mut now = clock.now();
            if now < self.deadline {
                gate.sleep_until(
                    Instant::now() + Duration::from_nanos(self.deadline - now).min(LONGEST_SLEEP),
                );
                now = clock.now();
                if now < self.deadline {
                    return; // the gate was closed meanwhile; sleep on after it opens
                }
            }
            let late = now.saturating_sub(self.deadline);
            if late >= threshold {
                block.note_stall(self.deadline, late);
            }
            last = now;
        }
        if self.left == 0 {
            let credit =
                block.credit.load(Ordering::Relaxed).wrapping_add(block.per_period.load(Ordering::Relaxed));
            block.credit.store(credit & u64::from(u32::MAX), Ordering::Relaxed);
            self.left = credit >> 32;
        }
        for _ in 0..self.left.min(BURST) {
            let step = self.stepper.next();
            part.write(step.page, step.slot, step.value);
            block.steps.store(self.stepper.done(), Ordering::Relaxed);
            self.left -= 1;
            let now = clock.now();
            let gap = now.saturating_sub(last);
            if gap >= threshold {
                block.note_stall(last, gap);
            }
            last = now;
        }
        self.last = Some(last);
    }

    /// Reads a few pages, as a vCPU does that only reads.
    fn read(&mut self, block: &ControlBlock, part: &WorkingPart<'_>) {
        let sum = (0..BURST).fold(0, |sum, _| part.read(self.stepper.next().page, sum));
        std::hint::black_box(sum);
        if self.stepper.done().is_multiple_of(READS_PER_COUNT) {
            block.reads.store(self.stepper.done(), Ordering::Relaxed);
        }
    }
}

/// A part of the working set, in the memory of this process.
struct WorkingPart<'a> {
    /// The slices of memory, each with the number of its first page, counted in the part.
    slices: Vec<(u64, memlane_kvm::ram::HostSlice)>,
    _ram: &'a GuestRam,
}

impl<'a> WorkingPart<'a> {
    fn new(ram: &'a GuestRam, layout: &GuestLayout, vcpu: u16) -> Self {
        let numbers = layout.part(vcpu);
        let slices = layout.runs(numbers.clone()).into_iter().flat_map(|(first, pages)| {
            let begin = pages.start;
            ram.slices(pages).map(move |slice| (first - numbers.start + slice.first_page - begin, slice))
        });
        Self { slices: slices.collect(), _ram: ram }
    }

    fn write(&self, page: u64, slot: usize, value: u64) {
        self.page(page)[slot].store(value, Ordering::Relaxed);
    }

    /// Continues a sum over all slots of a page.
    fn read(&self, page: u64, sum: u64) -> u64 {
        let slots = self.page(page).iter().map(|slot| slot.load(Ordering::Relaxed));
        slots.fold(sum, |sum, value| (sum ^ value).wrapping_mul(READ_FACTOR))
    }

    fn page(&self, page: u64) -> &[AtomicU64; SLOTS] {
        let index = self.slices.partition_point(|(first, _)| *first <= page);
        let (first, slice) = &self.slices[index.checked_sub(1).expect("the first slice begins with page 0")];
        let offset = (page - first) as usize * PAGE_SIZE as usize;
        assert!(offset < slice.len, "steps stay within the part");
        // SAFETY: the page lies within the slice, which lives as long as the RAM is borrowed; slices
        // are whole pages. The memory is shared, so all who use it take it for atomics.
        unsafe { &*slice.ptr.add(offset).cast() }
    }
}
