//! Guests of both kinds run, are compared with the model, and move from one VMM to another
//! within this process.

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use memlane_kvm::attach::{TrackingPhase, Vmm};
use memlane_kvm::compat;
use memlane_kvm::ram::{Backing, GuestRam};
use memlane_kvm::shared::SharedWords;
use memlane_protocol::wire::machine::{Machine, TrackerKind};
use memlane_protocol::{PAGE_SIZE, PageSet};
use memlane_vmm::control::{self, ControlClient};
use memlane_vmm::guest::{ControlBlock, GuestLayout};
use memlane_vmm::run_state::RunState;
use memlane_vmm::statistics::Stats;
use memlane_vmm::vmm::{GuestVmm, VmmConfig};
use memlane_vmm::workload::{Fill, Pattern, TICK, Workload, WriteRate};

const PATTERNS: [Pattern; 3] = [Pattern::Uniform, Pattern::Sequential, Pattern::HotCold];

fn config(kvm: bool) -> VmmConfig {
    VmmConfig {
        name: "guest".parse().unwrap(),
        ram_bytes: 32 << 20,
        resident: None,
        gap: false,
        backing: Backing::Memfd,
        prepare: false,
        vcpus: 1,
        kvm,
        tracker: if kvm { TrackerKind::Log } else { TrackerKind::Pagemap },
        workload: Workload {
            seed: 42,
            pattern: Pattern::Uniform,
            rate: WriteRate::FlatOut,
            tick: TICK,
            working_set_pages: 1500,
            readers: 0,
            fill: Fill { zero: 50, random: 30, compressible: 20, mixed: 0 },
        },
        nics: vec![],
        without: vec![],
        incoming: false,
        attach: None,
    }
}

/// The VMM, unless this machine lacks what it needs.
fn vmm(test: &str, config: VmmConfig) -> Option<GuestVmm> {
    if config.kvm && !std::path::Path::new("/dev/kvm").exists() {
        memlane_lab::say_skipped(test, "no /dev/kvm");
        return None;
    }
    match GuestVmm::new(config) {
        Ok(vmm) => Some(vmm),
        Err(error) if error.contains("is not available here") => {
            memlane_lab::say_skipped(test, &error.to_string());
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// Lets the guest run for a time.
fn run_for(vmm: &mut GuestVmm, milliseconds: u64) {
    vmm.resume().unwrap();
    sleep(Duration::from_millis(milliseconds));
    vmm.pause().unwrap();
}

/// Lets the guest run for a time, and until every vCPU has done steps or reads, however busy the host is.
fn run_on(vmm: &mut GuestVmm, milliseconds: u64) {
    let observer = vmm.observer();
    let done = || {
        let Stats { steps, reads, .. } = observer.stats();
        [steps, reads].concat()
    };
    let before = done();
    let since = Instant::now();
    vmm.resume().unwrap();
    sleep(Duration::from_millis(milliseconds));
    while done().iter().zip(&before).any(|(now, before)| now <= before) {
        assert!(since.elapsed() < Duration::from_secs(30), "a vCPU does nothing");
        sleep(Duration::from_millis(1));
    }
    vmm.pause().unwrap();
}

/// Compares all of RAM; returns the steps done.
#[track_caller]
fn assert_equal(vmm: GuestVmm, what: &str) -> (GuestVmm, u64) {
    let observer = vmm.observer();
    let vmm = Mutex::new(vmm);
    let report = observer.verify(&vmm).unwrap();
    assert!(report.equal, "{what}: {report:#x?}");
    let vmm = vmm.into_inner().unwrap();
    assert_eq!(report.pages, vmm.ram().pages());
    (vmm, report.steps)
}

#[test]
fn the_guest_does_what_the_model_says() {
    for kvm in [true, false] {
        for pattern in PATTERNS {
            for vcpus in [1, 2, 4] {
                for rate in [WriteRate::FlatOut, WriteRate::PagesPerSecond(20_000)] {
                    let what = format!("kvm {kvm}, {pattern:?}, {vcpus} vCPUs, {rate:?}");
                    let mut config = VmmConfig { vcpus, gap: vcpus != 2, ..config(kvm) };
                    // Across the hole, with the gap: it is in the middle of RAM.
                    config.workload = Workload { pattern, rate, working_set_pages: 6000, ..config.workload };
                    let Some(mut vmm) = vmm(&what, config) else { continue };
                    run_on(&mut vmm, 40);
                    let (mut vmm, steps) = assert_equal(vmm, &what);
                    assert!(steps > 0, "{what}");
                    run_on(&mut vmm, 20);
                    let (_, more) = assert_equal(vmm, &what);
                    assert!(more > steps, "{what}");
                }
            }
        }
    }
}

#[test]
fn an_idle_guest_writes_nothing_but_its_blocks() {
    for kvm in [true, false] {
        let mut config = config(kvm);
        config.workload.rate = WriteRate::PagesPerSecond(0);
        let Some(mut vmm) = vmm("an_idle_guest_writes_nothing_but_its_blocks", config) else { continue };
        run_for(&mut vmm, 20);
        assert_eq!(assert_equal(vmm, "idle").1, 0);
    }
}

#[test]
fn readers_write_nothing_but_their_counts() {
    for kvm in [true, false] {
        // KVM's own trackers take a page for written that is mapped for the first time.
        let mut config = VmmConfig { vcpus: 3, gap: true, tracker: TrackerKind::Pagemap, ..config(kvm) };
        // The first vCPU writes, and has nothing to write. The working set goes across the hole.
        config.workload.rate = WriteRate::PagesPerSecond(0);
        config.workload = Workload { readers: 2, working_set_pages: 6000, ..config.workload };
        let layout = layout(&config);
        let Some(mut vmm) = vmm("readers_write_nothing_but_their_counts", config) else { continue };
        let pages = vmm.ram().pages();
        let (words, _descriptor) = SharedWords::create(PageSet::words_needed(pages)).unwrap();
        let dirty = PageSet::over(pages, words).unwrap();
        vmm.tracker().start().unwrap();
        vmm.tracker().write_protect(0..pages).unwrap();
        vmm.tracker().harvest(&dirty).unwrap();
        dirty.remove_range(0..pages);
        let observer = vmm.observer();
        let before = observer.stats();
        assert_eq!((before.steps, before.reads), (vec![0], vec![0, 0]));
        vmm.resume().unwrap();
        let since = Instant::now();
        let mut per_second: f64 = 0.0;
        loop {
            let stats = observer.stats();
            per_second = per_second.max(stats.reads_per_second);
            if !stats.reads.contains(&0) {
                break;
            }
            assert!(since.elapsed() < Duration::from_secs(30), "kvm {kvm}: a reader does nothing");
            sleep(Duration::from_millis(1));
        }
        vmm.pause().unwrap();
        assert!(per_second > 0.0, "kvm {kvm}");
        vmm.tracker().harvest(&dirty).unwrap();
        vmm.tracker().stop().unwrap();
        // Of what lies before it, the oracle tells.
        let written: Vec<_> = dirty.runs().filter(|run| run.end > layout.working_set().start).collect();
        assert_eq!(written, [], "kvm {kvm}");
        assert_eq!(assert_equal(vmm, "after reading").1, 0);
    }
}

#[test]
fn a_changed_byte_is_found_wherever_it_is() {
    for kvm in [true, false] {
        let Some(mut vmm) = vmm("a_changed_byte_is_found_wherever_it_is", config(kvm)) else { continue };
        run_for(&mut vmm, 10);
        // Nothing, code or unused, working set, filled once, last page.
        for page in [0, 1, 30, 600, 1700, 4000, vmm.ram().pages() - 1] {
            flip(vmm.ram(), page, 1234);
            let observer = vmm.observer();
            let locked = Mutex::new(vmm);
            let report = observer.verify(&locked).unwrap();
            vmm = locked.into_inner().unwrap();
            assert!(!report.equal && report.wrong_pages == 1, "page {page}: {report:?}");
            assert_eq!((report.differences[0].page, report.differences[0].offset), (page, 1232));
            flip(vmm.ram(), page, 1234);
        }
        assert_equal(vmm, "after all was put back");
    }
}

fn flip(ram: &GuestRam, page: u64, offset: usize) {
    let slice = ram.slices(page..page + 1).next().unwrap();
    // SAFETY: the offset lies within the page, and the guest stands still.
    unsafe { *slice.ptr.add(offset) ^= 1 };
}

#[test]
fn guests_move_with_every_tracker() {
    for (kvm, tracker) in [
        (true, TrackerKind::Log),
        (true, TrackerKind::Ring),
        (true, TrackerKind::Pagemap),
        (false, TrackerKind::Pagemap),
    ] {
        for (vcpus, readers, rate) in [
            (1, 0, WriteRate::FlatOut),
            (2, 0, WriteRate::PagesPerSecond(30_000)),
            (4, 0, WriteRate::FlatOut),
            (3, 1, WriteRate::FlatOut),
        ] {
            let what = format!("kvm {kvm}, {tracker:?}, {vcpus} vCPUs, {readers} readers, {rate:?}");
            let mut source = VmmConfig { vcpus, gap: true, tracker, ..config(kvm) };
            source.workload = Workload { readers, rate, ..source.workload };
            let destination = VmmConfig { incoming: true, ..source.clone() };
            let (Some(mut source), Some(mut destination)) = (vmm(&what, source), vmm(&what, destination))
            else {
                continue;
            };
            assert_eq!(compat::check(&source.shape(), &destination.shape()), [], "{what}");
            run_on(&mut source, 10);
            source.resume().unwrap();
            migrate(&mut source, &mut destination);
            let (left, came) = (source.observer().stats().reads, destination.observer().stats().reads);
            assert_eq!((left.len(), left), (usize::from(readers), came), "{what}");
            let (source, before) = assert_equal(source, &what);
            let (mut destination, arrived) = assert_equal(destination, &what);
            assert_eq!(before, arrived, "{what}");
            assert_eq!(destination.standing(), RunState::Loaded);

            run_on(&mut destination, 30);
            let (destination, after) = assert_equal(destination, &what);
            assert!(after > before, "{what}: the guest must go on");
            let stats = destination.observer().stats();
            assert!(stats.tracking_stall_ns.is_some(), "{what}: notes move with the guest");
            if rate == WriteRate::FlatOut {
                assert!(stats.longest_stall_ns > 0, "{what}: being moved is a stall");
            }
            drop(source);
        }
    }
}

/// Pre-copy, as a daemon does it, from one VMM of this process to another.
fn migrate(source: &mut GuestVmm, destination: &mut GuestVmm) {
    let pages = source.ram().pages();
    let (words, _descriptor) = SharedWords::create(PageSet::words_needed(pages)).unwrap();
    let dirty = PageSet::over(pages, words).unwrap();
    source.tracker().start().unwrap();
    source.tracking_changed(TrackingPhase::Started);
    for first in (0..pages).step_by(512) {
        source.tracker().write_protect(first..(first + 512).min(pages)).unwrap();
    }
    source.tracking_changed(TrackingPhase::WriteProtected);
    dirty.insert_range(0..pages);
    for round in 0..4 {
        if round == 3 {
            source.pause().unwrap();
        }
        source.tracker().harvest(&dirty).unwrap();
        for run in dirty.runs().collect::<Vec<_>>() {
            dirty.remove_range(run.clone());
            copy(source.ram(), destination.ram(), run);
        }
    }
    source.tracker().stop().unwrap();
    source.tracking_changed(TrackingPhase::Stopped);
    let state = source.save().unwrap();
    destination.load(&state).unwrap();
}

fn copy(from: &GuestRam, to: &GuestRam, pages: std::ops::Range<u64>) {
    for (from, to) in from.slices(pages.clone()).zip(to.slices(pages)) {
        assert_eq!((from.first_page, from.len), (to.first_page, to.len));
        // SAFETY: both slices are mapped and have this length; what the guest writes meanwhile
        // is found dirty and copied again.
        unsafe { from.ptr.copy_to_nonoverlapping(to.ptr, from.len) };
    }
}

#[test]
fn the_vmm_keeps_its_guest_in_order() {
    for kvm in [true, false] {
        let test = "the_vmm_keeps_its_guest_in_order";
        let (Some(mut here), Some(mut there)) =
            (vmm(test, config(kvm)), vmm(test, VmmConfig { incoming: true, ..config(kvm) }))
        else {
            continue;
        };
        assert!(there.resume().unwrap_err().to_string().contains("no guest has arrived"));
        assert!(there.save().is_err());
        here.pause().unwrap();
        here.resume().unwrap();
        here.resume().unwrap();
        assert!(here.save().unwrap_err().to_string().contains("paused"));
        here.pause().unwrap();
        here.pause().unwrap();
        let state = here.save().unwrap();
        assert!(here.load(&state).unwrap_err().to_string().contains("already"));
        assert!(there.load(b"nonsense").is_err());
        assert!(there.load(&state[..state.len() - 1]).is_err());
        assert_eq!(there.standing(), RunState::Incoming);
        there.load(&state).unwrap();
        assert!(there.load(&state).is_err());
        here.discard();
        assert!(here.resume().unwrap_err().to_string().contains("given up"));
    }
}

#[test]
fn reports_that_make_no_sense_do_no_harm() {
    for kvm in [true, false] {
        let mut config = VmmConfig { vcpus: 2, ..config(kvm) };
        config.workload.readers = 1;
        let layout = layout(&config);
        let Some(mut vmm) = vmm("reports_that_make_no_sense_do_no_harm", config) else { continue };
        run_for(&mut vmm, 10);
        // Whatever the guest, or a destination's peer, wrote into what the guest reports.
        for value in [u64::MAX, 1 << 63, 0] {
            let block = ControlBlock::of(vmm.ram(), &layout, 0);
            for field in [&block.credit, &block.deadline, &block.stalls, &block.longest, &block.steps] {
                field.store(value, Ordering::Relaxed);
            }
            ControlBlock::of(vmm.ram(), &layout, 1).reads.store(value, Ordering::Relaxed);
            block.histogram[63].store(value, Ordering::Relaxed);
            block.ring.iter().for_each(|stall| {
                stall.begin.store(value, Ordering::Relaxed);
                stall.ticks.store(value, Ordering::Relaxed);
            });
            let observer = vmm.observer();
            observer.stats();
            vmm.tracking_changed(TrackingPhase::Started);
            run_for(&mut vmm, 5);
            vmm.tracking_changed(TrackingPhase::WriteProtected);
            observer.stats();
            vmm.save().unwrap();
        }
    }
}

fn layout(config: &VmmConfig) -> GuestLayout {
    GuestLayout::new(config.ram_bytes, config.gap, config.vcpus, &config.workload).unwrap()
}

#[test]
fn a_narrower_processor_is_told_apart() {
    let test = "a_narrower_processor_is_told_apart";
    let Some(full) = vmm(test, config(true)) else { return };
    let has = |feature: &str| {
        let without = vec![feature.parse().unwrap()];
        let narrow = vmm(test, VmmConfig { without, incoming: true, ..config(true) })?;
        let reasons = compat::check(&full.shape(), &narrow.shape());
        (!reasons.is_empty()).then_some((feature.to_owned(), reasons))
    };
    let Some((feature, reasons)) = ["avx2", "sse4_2"].into_iter().find_map(has) else {
        memlane_lab::say_skipped(test, "the host has neither avx2 nor sse4_2");
        return;
    };
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].to_string().contains(&feature), "{}", reasons[0]);
    assert_ne!(full.shape().machine.features & Machine::KVM, 0);
}

#[test]
fn the_control_socket_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let Some(mut vmm) = vmm("the_control_socket_answers", config(false)) else { return };
    vmm.resume().unwrap();
    let observer = Arc::new(vmm.observer());
    let vmm = Arc::new(Mutex::new(vmm));
    let (quit, quits) = channel();
    control::serve(&path, Arc::clone(&vmm), observer, quit).unwrap();

    let mut client = ControlClient::connect(&path).unwrap();
    let first = client.stats().unwrap();
    assert_eq!((first.standing.as_str(), first.tracking_stall_ns), ("running", None));
    sleep(Duration::from_millis(20));
    let second = client.stats().unwrap();
    assert!(second.steps[0] > first.steps[0] && second.steps_per_second > 0.0);
    assert!(client.verify().unwrap().equal);
    let stalled = client.stats().unwrap();
    assert!(stalled.longest_stall_ns > 0 && !stalled.stalls.is_empty(), "comparing is a stall");

    vmm.lock().unwrap().pause().unwrap();
    client.reset_stalls().unwrap();
    let reset = client.stats().unwrap();
    assert_eq!((reset.longest_stall_ns, reset.stalls.len(), reset.histogram.len()), (0, 0, 0));
    assert_eq!(reset.standing, "paused");
    assert!(client.verify().unwrap().equal);
    assert_eq!(client.stats().unwrap().standing, "paused", "a paused guest stays paused");

    flip(vmm.lock().unwrap().ram(), 4000, 8);
    let report = client.verify().unwrap();
    assert!(!report.equal && report.differences[0].address == 4000 * PAGE_SIZE);

    use std::io::{BufRead, BufReader, Write};
    let mut raw = std::os::unix::net::UnixStream::connect(&path).unwrap();
    raw.write_all(b"{\"do\":\"dance\"}\nnonsense\n").unwrap();
    let mut lines = BufReader::new(raw).lines();
    for _ in 0..2 {
        assert!(lines.next().unwrap().unwrap().contains("not understood"));
    }
    client.quit().unwrap();
    quits.recv().unwrap();
}

#[test]
fn every_backing_will_do() {
    let directory = match tempfile::tempdir_in("/dev/shm") {
        Ok(directory) => directory,
        Err(error) => {
            memlane_lab::say_skipped("every_backing_will_do", &format!("no /dev/shm ({error})"));
            return;
        }
    };
    let file = directory.path().join("ram");
    for backing in [Backing::File(directory.path().into()), Backing::File(file.clone()), Backing::File(file)]
    {
        for kvm in [true, false] {
            let config = VmmConfig { backing: backing.clone(), gap: true, prepare: kvm, ..config(kvm) };
            let Some(mut vmm) = vmm("every_backing_will_do", config) else { continue };
            run_for(&mut vmm, 10);
            assert_equal(vmm, "file");
        }
    }
    let huge = VmmConfig { backing: Backing::HugeMemfd, ..config(true) };
    // Without them, making the guest fails and says so.
    let _pages = memlane_lab::HugePages::reserve(huge.ram_bytes >> 21);
    match GuestVmm::new(huge) {
        Ok(mut vmm) => {
            run_for(&mut vmm, 10);
            assert_equal(vmm, "huge pages");
        }
        Err(error) => memlane_lab::say_skipped("huge pages", &error.to_string()),
    }
}
