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
use crate::guest::{ControlBlock, Guest, Layout, SYSTEM_PAGES};
use crate::history::History;
use crate::oracle::{Oracle, Report};
use crate::statistics::{Notes, Progress, Stats, reads, steps, sum};
use crate::workload::{SLOTS, Workload};

/// The name under which VMMs of this program know each other.
pub const PROGRAM: &str = "memlane-vmm";

/// What a VMM is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// The guest's name.
    pub name: Label,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Half of RAM above the hole in the address space, however little it is.
    pub gap: bool,
    /// Bytes of RAM that the guest may touch, in pieces from its beginning to its end; all of it if not given.
    pub resident: Option<u64>,
    /// What RAM is made of.
    pub backing: Backing,
    /// Take all of RAM from the system at the start.
    pub prepare: bool,
    /// Number of vCPUs, readers included.
    pub vcpus: u16,
    /// A virtual machine; otherwise threads of this process.
    pub kvm: bool,
    /// How dirty pages are found.
    pub tracker: TrackerKind,
    /// What the guest does.
    pub workload: Workload,
    /// Network interfaces that it is said to have.
    pub nics: Vec<Nic>,
    /// Processor features that it is not given.
    pub without: Vec<Feature>,
    /// Whether it comes from another host; otherwise it starts here.
    pub incoming: bool,
    /// The daemon's attach socket, if it is to attach.
    pub attach: Option<PathBuf>,
}

/// A guest in its VMM.
pub struct GuestVmm {
    config: Config,
    layout: Layout,
    // Before the RAM: it is dropped first, and its threads write there.
    guest: Arc<dyn Guest>,
    tracker: Box<dyn DirtyTracker>,
    ram: Arc<GuestRam>,
    notes: Arc<Mutex<Notes>>,
    standing: Arc<Mutex<Standing>>,
    history: Option<History>,
}

/// A look at a guest that needs no lock on its VMM.
pub struct Observer {
    layout: Layout,
    guest: Arc<dyn Guest>,
    ram: Arc<GuestRam>,
    notes: Arc<Mutex<Notes>>,
    standing: Arc<Mutex<Standing>>,
    oracle: Mutex<Oracle>,
    /// When steps and reads were last counted, and how many there were of each.
    counted: Mutex<Option<(Instant, [u64; 2])>>,
}

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// It is expected from another host.
    Incoming,
    /// It has arrived and stands still.
    Loaded,
    /// It has been given up.
    Discarded,
}

impl GuestVmm {
    /// Makes the guest. It stands still.
    pub fn new(config: Config) -> Result<Self, String> {
        let layout = layout(&config)?;
        let ram = GuestRam::create(layout.regions(), &config.backing)
            .map_err(|error| format!("cannot make the guest's memory: {error}"))?;
        let ram = Arc::new(ram);
        let program = Program {
            name: PROGRAM.parse().expect("the program's name is a label"),
            state_version: state::VERSION,
            vcpus: config.vcpus,
        };
        let (guest, tracker, khz): (Arc<dyn Guest>, _, _) = match config.kvm {
            true => {
                let options = kvm::Options {
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
        let standing = if config.incoming { Standing::Incoming } else { Standing::Paused };
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

    /// Notes in `history` how the guest stands, and each change from now on.
    pub fn keep_history(&mut self, history: History) {
        history.note(self.standing());
        self.history = Some(history);
    }

    /// A look at the guest.
    pub fn observer(&self) -> Observer {
        let oracle =
            Oracle::new(&self.layout, &self.config.workload, self.guest.image(), self.guest.stops_anywhere());
        Observer {
            layout: self.layout.clone(),
            guest: Arc::clone(&self.guest),
            ram: Arc::clone(&self.ram),
            notes: Arc::clone(&self.notes),
            standing: Arc::clone(&self.standing),
            oracle: Mutex::new(oracle),
            counted: Mutex::new(None),
        }
    }

    /// What the guest is doing.
    pub fn standing(&self) -> Standing {
        *lock(&self.standing)
    }

    fn stand(&self, standing: Standing) {
        self.note(standing);
        *lock(&self.standing) = standing;
    }

    fn note(&self, standing: Standing) {
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
        if self.standing() == Standing::Running {
            self.guest.pause()?;
            self.stand(Standing::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        match self.standing() {
            Standing::Running => Ok(()),
            before @ (Standing::Paused | Standing::Loaded) => {
                self.note(Standing::Running);
                self.guest.resume().inspect_err(|_| self.note(before))?;
                *lock(&self.standing) = Standing::Running;
                Ok(())
            }
            Standing::Incoming => Err("no guest has arrived that could run".into()),
            Standing::Discarded => Err("the guest was given up".into()),
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        if self.standing() != Standing::Paused && self.standing() != Standing::Loaded {
            return Err("only a paused guest can be saved".into());
        }
        self.look_for_tracking_stall();
        let own = serde_json::to_vec(&*lock(&self.notes))?;
        Ok(self.guest.save(own)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        if self.standing() != Standing::Incoming {
            return Err("a guest is here already; only a VMM that awaits one can load".into());
        }
        let own = self.guest.load(state)?;
        *lock(&self.notes) =
            serde_json::from_slice(&own).map_err(|error| format!("the VMM's notes are no JSON: {error}"))?;
        self.stand(Standing::Loaded);
        Ok(())
    }

    fn discard(&mut self) {
        if let Err(error) = self.guest.pause() {
            tracing::warn!(error, "the guest that is given up did not stop in order");
        }
        self.stand(Standing::Discarded);
    }

    fn tracking_changed(&mut self, phase: TrackingPhase) {
        lock(&self.notes).tracking_changed(phase, &self.guest.clock());
        if phase != TrackingPhase::Started {
            self.look_for_tracking_stall();
        }
    }
}

impl Observer {
    /// How the guest is doing.
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

    /// How far it is. This only looks at memory, which in post-copy may have to come first.
    pub fn progress(&self) -> Progress {
        let steps = sum(&steps(&self.ram, &self.layout));
        let reads = sum(&reads(&self.ram, &self.layout));
        // After what it tells the time of, for that may have taken some.
        Progress { realtime_ns: self.guest.clock().realtime, steps, reads }
    }

    /// What the guest is doing.
    pub fn standing(&self) -> Standing {
        *lock(&self.standing)
    }

    /// Forgets the stalls so far.
    pub fn reset_stalls(&self) {
        lock(&self.notes).reset_stalls(&self.ram, &self.layout);
    }

    /// Compares all of RAM with the model. The guest stands still meanwhile, and then does again
    /// what it did.
    pub fn verify(&self, vmm: &Mutex<GuestVmm>) -> Result<Report, String> {
        if *lock(&self.standing) == Standing::Incoming {
            return Err("no guest has arrived whose memory could be compared".into());
        }
        let mut oracle = lock(&self.oracle);
        // Most of the replay while the guest still runs, so that it stands still the shorter.
        oracle.advance(&steps(&self.ram, &self.layout));
        let mut vmm = lock(vmm);
        let was_running = vmm.standing() == Standing::Running;
        vmm.pause().map_err(|error| error.to_string())?;
        oracle.advance(&steps(&self.ram, &self.layout));
        let report =
            oracle.compare(&self.ram).map_err(|error| format!("cannot read the guest's memory: {error}"));
        if was_running {
            vmm.resume().map_err(|error| error.to_string())?;
        }
        report
    }

    /// Waits for a vCPU to fail, at most `patience`; tells why.
    pub fn failure(&self, patience: Duration) -> Option<String> {
        self.guest.failure(patience)
    }
}

impl Standing {
    /// Its name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Incoming => "incoming",
            Self::Loaded => "loaded",
            Self::Discarded => "discarded",
        }
    }
}

fn layout(config: &Config) -> Result<Layout, String> {
    let Config { ram_bytes, gap, vcpus, ref workload, .. } = *config;
    match config.resident {
        None => Layout::new(ram_bytes, gap, vcpus, workload),
        Some(_) if config.kvm => {
            Err("the guest of a virtual machine may touch all of its RAM; use a process".into())
        }
        Some(_) if config.prepare => {
            Err("all of RAM is taken from the system, or some of it resident".into())
        }
        Some(bytes) => Layout::spread(ram_bytes, gap, vcpus, workload, bytes / PAGE_SIZE),
    }
}

/// Writes what is there before the first step. Pages of zeros are left as holes.
fn write_memory(
    ram: &GuestRam,
    layout: &Layout,
    workload: &Workload,
    guest: &dyn Guest,
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

/// What is behind these locks is whole between any two statements.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
