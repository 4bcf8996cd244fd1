//! The VMM: a guest, its memory, its tracker, and what the daemon may ask of them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memlane_kvm::attach::{TrackingPhase, Vmm, VmmError};
use memlane_kvm::compat::{Feature, Program};
use memlane_kvm::dirty::{DirtyTracker, PagemapTracker};
use memlane_kvm::ram::{Backing, GuestRam};
use memlane_kvm::state;
use memlane_protocol::PAGE_SIZE;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::machine::{GuestShape, Nic, TrackerKind};

use crate::guest::kvm::{self, KvmGuest};
use crate::guest::process::{self, ProcessGuest};
use crate::guest::{ControlBlock, GuestLayout, GuestMachine, SYSTEM_PAGES};
use crate::history::HistoryFile;
use crate::oracle::{Oracle, OracleReport};
use crate::run_state::RunState;
use crate::statistics::{GuestProgress, Notes, Stats, reads, steps, sum};
use crate::workload::{SLOTS, Workload};

/// The name under which VMMs of this program know each other.
pub const PROGRAM: &str = "memlane-vmm";

/// The settings of a VMM and its guest.
#[derive(Clone, Debug)]
pub struct VmmConfig {
    /// The guest's name.
    pub name: Label,
    /// The size of RAM, in bytes.
    pub ram_bytes: u64,
    /// Whether half of RAM lies above the hole in the address space, even if it is little.
    pub gap: bool,
    /// The amount of RAM that the guest may touch, in bytes, in pieces from its beginning to its end; all of it if not
    /// given.
    pub resident: Option<u64>,
    /// The memory that RAM is made of.
    pub backing: Backing,
    /// Whether all of RAM is taken from the system at the start.
    pub prepare: bool,
    /// Number of vCPUs, readers included.
    pub vcpus: u16,
    /// Whether the guest is a virtual machine; otherwise it is threads of this process.
    pub kvm: bool,
    /// The way in which dirty pages are found.
    pub tracker: TrackerKind,
    /// The work that the guest does.
    pub workload: Workload,
    /// The network interfaces that the guest is said to have.
    pub nics: Vec<Nic>,
    /// The processor features that the guest is not given.
    pub without: Vec<Feature>,
    /// Whether the guest comes from another host; otherwise it starts here.
    pub incoming: bool,
    /// The daemon's attach socket, if it is to attach.
    pub attach: Option<PathBuf>,
}

/// A guest in its VMM.
pub struct GuestVmm {
    config: VmmConfig,
    layout: GuestLayout,
    // Before the RAM: it is dropped first, and its threads write there.
    guest: Arc<dyn GuestMachine>,
    tracker: Box<dyn DirtyTracker>,
    ram: Arc<GuestRam>,
    notes: Arc<Mutex<Notes>>,
    standing: Arc<Mutex<RunState>>,
    history: Option<HistoryFile>,
}

/// A view of a guest that needs no lock on its VMM.
pub struct GuestView {
    layout: GuestLayout,
    guest: Arc<dyn GuestMachine>,
    ram: Arc<GuestRam>,
    notes: Arc<Mutex<Notes>>,
    standing: Arc<Mutex<RunState>>,
    oracle: Mutex<Oracle>,
    /// The time when steps and reads were last counted, and the number of each.
    counted: Mutex<Option<(Instant, [u64; 2])>>,
}

impl GuestVmm {
    /// Makes the guest. It is paused.
    pub fn new(config: VmmConfig) -> Result<Self, String> {
        let layout = layout(&config)?;
        let ram = GuestRam::create(layout.regions(), &config.backing)
            .map_err(|error| format!("cannot make the guest's memory: {error}"))?;
        let ram = Arc::new(ram);
        let program = Program {
            name: PROGRAM.parse().expect("the program's name is a label"),
            state_version: state::VERSION,
            vcpus: config.vcpus,
        };
        let (guest, tracker, khz): (Arc<dyn GuestMachine>, _, _) = match config.kvm {
            true => {
                let options = kvm::KvmOptions {
                    program,
                    without: config.without.clone(),
                    tracker: config.tracker,
                    incoming: config.incoming,
                };
                let (guest, tracker) = KvmGuest::new(&options, &layout, &ram)?;
                let khz = guest.tsc_khz();
                (Arc::new(guest), tracker, khz)
            }
            false if config.tracker == TrackerKind::Pagemap => {
                let tracker = PagemapTracker::new(Arc::clone(&ram))
                    .map_err(|error| format!("cannot track the guest's memory: {error}"))?;
                let guest = ProcessGuest::new(&program, &config.workload, &layout, &ram)?;
                (Arc::new(guest), Box::new(tracker) as Box<dyn DirtyTracker>, process::KHZ)
            }
            false => {
                return Err(format!(
                    "a process has no {} tracker, which is KVM's; use pagemap",
                    config.tracker.name()
                ));
            }
        };
        if !config.incoming {
            write_memory(&ram, &layout, &config.workload, &*guest)?;
            for vcpu in 0..layout.vcpus() {
                ControlBlock::of(&ram, &layout, vcpu).set_up(&layout, &config.workload, vcpu, khz);
            }
        }
        if config.prepare {
            // After all that makes holes again.
            ram.populate_write(0..ram.pages()).map_err(|error| format!("cannot take all of RAM: {error}"))?;
        }
        let standing = if config.incoming { RunState::Incoming } else { RunState::Paused };
        Ok(Self {
            config,
            layout,
            guest,
            tracker,
            ram,
            notes: Arc::default(),
            standing: Arc::new(Mutex::new(standing)),
            history: None,
        })
    }

    /// Writes the guest's state into `history`, and each change from now on.
    pub fn keep_history(&mut self, history: HistoryFile) {
        history.note(self.standing());
        self.history = Some(history);
    }

    /// Returns a view of the guest.
    pub fn observer(&self) -> GuestView {
        let oracle =
            Oracle::new(&self.layout, &self.config.workload, self.guest.image(), self.guest.stops_anywhere());
        GuestView {
            layout: self.layout.clone(),
            guest: Arc::clone(&self.guest),
            ram: Arc::clone(&self.ram),
            notes: Arc::clone(&self.notes),
            standing: Arc::clone(&self.standing),
            oracle: Mutex::new(oracle),
            counted: Mutex::new(None),
        }
    }

    /// Returns the guest's state.
    pub fn standing(&self) -> RunState {
        *lock(&self.standing)
    }

    fn stand(&self, standing: RunState) {
        self.note(standing);
        *lock(&self.standing) = standing;
    }

    fn note(&self, standing: RunState) {
        if let Some(history) = &self.history {
            history.note(standing);
        }
    }

    fn look_for_tracking_stall(&self) {
        lock(&self.notes).look_for_tracking_stall(&self.ram, &self.layout, &self.guest.clock());
    }
}

impl Vmm for GuestVmm {
    fn shape(&self) -> GuestShape {
        GuestShape {
            name: self.config.name.clone(),
            tracker: self.config.tracker,
            machine: self.guest.machine(),
            regions: self.ram.regions().to_vec(),
            nics: self.config.nics.clone(),
        }
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut *self.tracker
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        if self.standing() == RunState::Running {
            self.guest.pause()?;
            self.stand(RunState::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        match self.standing() {
            RunState::Running => Ok(()),
            before @ (RunState::Paused | RunState::Loaded) => {
                self.note(RunState::Running);
                self.guest.resume().inspect_err(|_| self.note(before))?;
                *lock(&self.standing) = RunState::Running;
                Ok(())
            }
            RunState::Incoming => Err("no guest has arrived that could run".into()),
            RunState::Discarded => Err("the guest was given up".into()),
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        if self.standing() != RunState::Paused && self.standing() != RunState::Loaded {
            return Err("only a paused guest can be saved".into());
        }
        self.look_for_tracking_stall();
        let own = serde_json::to_vec(&*lock(&self.notes))?;
        Ok(self.guest.save(own)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        if self.standing() != RunState::Incoming {
            return Err("a guest is here already; only a VMM that awaits one can load".into());
        }
        let own = self.guest.load(state)?;
        *lock(&self.notes) =
            serde_json::from_slice(&own).map_err(|error| format!("the VMM's notes are no JSON: {error}"))?;
        self.stand(RunState::Loaded);
        Ok(())
    }

    fn discard(&mut self) {
        if let Err(error) = self.guest.pause() {
            tracing::warn!(error, "the guest that is given up could not be stopped in order");
        }
        self.stand(RunState::Discarded);
    }

    fn tracking_changed(&mut self, phase: TrackingPhase) {
        lock(&self.notes).tracking_changed(phase, &self.guest.clock());
        if phase != TrackingPhase::Started {
            self.look_for_tracking_stall();
        }
    }
}

impl GuestView {
    /// Returns the guest's statistics.
    pub fn stats(&self) -> Stats {
        let standing = self.standing();
        let mut stats = lock(&self.notes).stats(&self.ram, &self.layout, &self.guest.clock());
        stats.standing = standing.name().into();
        let counts = [sum(&stats.steps), sum(&stats.reads)];
        if let Some((when, before)) = lock(&self.counted).replace((Instant::now(), counts)) {
            let seconds = when.elapsed().as_secs_f64();
            let rate = |index: usize| counts[index].saturating_sub(before[index]) as f64 / seconds;
            (stats.steps_per_second, stats.reads_per_second) = (rate(0), rate(1));
        }
        stats
    }

    /// Returns the guest's progress. This only looks at memory, which in post-copy may have to come first.
    pub fn progress(&self) -> GuestProgress {
        let steps = sum(&steps(&self.ram, &self.layout));
        let reads = sum(&reads(&self.ram, &self.layout));
        // After what it tells the time of, for that may have taken some.
        GuestProgress { realtime_ns: self.guest.clock().realtime, steps, reads }
    }

    /// Returns the guest's state.
    pub fn standing(&self) -> RunState {
        *lock(&self.standing)
    }

    /// Forgets the stalls so far.
    pub fn reset_stalls(&self) {
        lock(&self.notes).reset_stalls(&self.ram, &self.layout);
    }

    /// Compares all of RAM with the model. The guest is paused meanwhile, and then continues if it ran before.
    pub fn verify(&self, vmm: &Mutex<GuestVmm>) -> Result<OracleReport, String> {
        if *lock(&self.standing) == RunState::Incoming {
            return Err("no guest has arrived whose memory could be compared".into());
        }
        let mut oracle = lock(&self.oracle);
        // Most of the replay while the guest still runs, so that it stands still the shorter.
        oracle.advance(&steps(&self.ram, &self.layout));
        let mut vmm = lock(vmm);
        let was_running = vmm.standing() == RunState::Running;
        vmm.pause().map_err(|error| error.to_string())?;
        oracle.advance(&steps(&self.ram, &self.layout));
        let report =
            oracle.compare(&self.ram).map_err(|error| format!("cannot read the guest's memory: {error}"));
        if was_running {
            vmm.resume().map_err(|error| error.to_string())?;
        }
        report
    }

    /// Waits at most `patience` for a vCPU to fail, and returns why it failed.
    pub fn failure(&self, patience: Duration) -> Option<String> {
        self.guest.failure(patience)
    }
}

fn layout(config: &VmmConfig) -> Result<GuestLayout, String> {
    let VmmConfig { ram_bytes, gap, vcpus, ref workload, .. } = *config;
    match config.resident {
        None => GuestLayout::new(ram_bytes, gap, vcpus, workload),
        Some(_) if config.kvm => {
            Err("the guest of a virtual machine may touch all of its RAM; use a process".into())
        }
        Some(_) if config.prepare => {
            Err("RAM can be prepared as a whole, or partly resident, but not both".into())
        }
        Some(bytes) => GuestLayout::spread(ram_bytes, gap, vcpus, workload, bytes / PAGE_SIZE),
    }
}

/// Writes the memory's contents before the first step. Pages of zeros are left as holes.
fn write_memory(
    ram: &GuestRam,
    layout: &GuestLayout,
    workload: &Workload,
    guest: &dyn GuestMachine,
) -> Result<(), String> {
    // A file that was there before may hold something.
    ram.punch(0..ram.pages()).map_err(|error| format!("cannot empty the guest's memory: {error}"))?;
    let image = guest.image();
    let mut contents = [0; SLOTS];
    for slice in layout.touched().into_iter().flat_map(|pages| ram.slices(pages)) {
        for (index, page) in (slice.first_page..slice.first_page + slice.len as u64 / PAGE_SIZE).enumerate() {
            if page >= SYSTEM_PAGES {
                if workload.fill.is_zero(workload.seed, page) {
                    continue;
                }
                workload.fill.write(workload.seed, page, &mut contents);
            } else if let Some(page) = image.get(&page) {
                contents = *page;
            } else {
                continue;
            }
            let at = slice.ptr.wrapping_add(index * PAGE_SIZE as usize).cast::<u64>();
            // SAFETY: the page lies within the slice, which lives as long as the RAM is borrowed,
            // and nobody else uses the memory yet.
            unsafe { at.copy_from_nonoverlapping(contents.as_ptr(), SLOTS) };
        }
    }
    Ok(())
}

/// Locks a mutex. What is behind these locks is whole between any two statements.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
