//! The thread that runs one vCPU.

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use memlane_kvm::dirty::RingHandle;
use memlane_kvm::dirty::ring::EXIT_RING_FULL;
use memlane_kvm::ram::GuestRam;
use memlane_kvm::vcpu::complete_io;
use rustix::io::Errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::clock::TscClock;
use super::code::SLEEP_PORT;
use super::{ControlBlock, GuestLayout};
use crate::gate::Gate;

/// The things that a vCPU's thread works with.
pub(crate) struct Vcpu {
    /// The number of the vCPU.
    pub index: u16,
    /// The vCPU. The thread holds the lock while the guest may run.
    pub fd: Arc<Mutex<VcpuFd>>,
    /// The gate at which the thread stops.
    pub gate: Arc<Gate>,
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// The layout, which says where the vCPU's control block lies.
    pub layout: GuestLayout,
    /// The guest's clock.
    pub clock: Arc<TscClock>,
    /// The handle of the dirty ring. It says what to do when the ring is full, and how long to stay out of the guest.
    pub ring: Option<RingHandle>,
    /// The slots of the threads of all vCPUs.
    pub seats: Arc<[ThreadSlot]>,
}

/// The number that the kernel has given to a vCPU's thread, while it runs; else 0.
#[derive(Debug, Default)]
pub(crate) struct ThreadSlot(AtomicI32);

impl ThreadSlot {
    /// Makes the thread leave the guest, or not enter it.
    pub(crate) fn kick(&self) {
        let thread = self.0.load(Ordering::Acquire);
        if thread != 0 {
            // SAFETY: the call reads nothing but its arguments. A thread of this process that has got the
            // number meanwhile has its system call interrupted, no more: the handler finds no vCPU there.
            // An error means that there is no such thread any more.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }
}

thread_local! {
    /// The field `immediate_exit` in the `kvm_run` of this thread's vCPU, while it has one.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// Installs the signal handler that [`ThreadSlot::kick`] needs, for the whole process.
pub(crate) fn install_kick() -> Result<(), String> {
    register_signal_handler(SIGRTMIN(), leave_guest)
        .map_err(|error| format!("cannot handle the signal that stops vCPUs: {error}"))
}

impl Vcpu {
    /// Starts the thread. It waits at the gate until that opens.
    pub(crate) fn start(self) -> std::io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(format!("vcpu{}", self.index)).spawn(move || {
            // The kernel would round the guest's sleeps up by 50 µs; without that they are truer,
            // and nothing is wrong if it does.
            let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
            let fd = Arc::clone(&self.fd);
            let seat = &self.seats[usize::from(self.index)];
            seat.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
            self.gate.leave_after(|| {
                IMMEDIATE_EXIT.set(&raw mut lock(&fd).get_kvm_run().immediate_exit);
                loop {
                    if !self.gate.pass() {
                        break None;
                    }
                    if let Err(failure) = self.run(&mut lock(&fd)) {
                        break Some(format!("vCPU {}: {failure}", self.index));
                    }
                }
            });
            // This thread's hold on the vCPU ends here.
            seat.0.store(0, Ordering::Release);
            IMMEDIATE_EXIT.set(null_mut());
        })
    }

    /// Runs the guest until the gate closes.
    fn run(&self, vcpu: &mut VcpuFd) -> Result<(), String> {
        loop {
            // In this order: a kick comes after the gate was closed, so that either the gate is
            // seen closed here or KVM_RUN returns at once.
            vcpu.set_kvm_immediate_exit(0);
            if !self.gate.is_open() {
                return complete_io(vcpu).map_err(|error| error.to_string());
            }
            if let Some(until) = self.ring.as_ref().and_then(|ring| ring.throttled_until(self.index.into())) {
                self.gate.sleep_until(until);
                continue;
            }
            match vcpu.run() {
                Ok(VcpuExit::IoOut(SLEEP_PORT, _)) => self.sleep(),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                    let ring = self.ring.as_ref().ok_or("a dirty ring is full, and no thread reads it")?;
                    ring.collect().map_err(|error| format!("emptying the dirty rings: {error}"))?;
                }
                Ok(VcpuExit::Hlt) => return Err("the guest halted; its program never does".into()),
                Ok(VcpuExit::Shutdown) => {
                    return Err(format!("the guest crashed (triple fault){}", place(vcpu)));
                }
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Err(format!(
                        "the processor refused to run the guest, reason {reason:#x}{}",
                        place(vcpu)
                    ));
                }
                Ok(other) => {
                    let exit = format!("{other:?}");
                    return Err(format!("unexpected exit {exit}{}", place(vcpu)));
                }
                Err(error) if error.errno() == Errno::INTR.raw_os_error() => {}
                Err(error) if error.errno() == Errno::AGAIN.raw_os_error() => {}
                Err(error) => return Err(format!("KVM_RUN failed: {error}")),
            }
        }
    }

    /// Sleeps as the guest has asked, until the deadline in its control block.
    fn sleep(&self) {
        let block = ControlBlock::of(&self.ram, &self.layout, self.index);
        let now = self.clock.now();
        // Negative if the deadline has passed.
        let ticks = block.deadline.load(Ordering::Relaxed).wrapping_sub(now).cast_signed();
        if ticks > 0 {
            let wait = Duration::from_nanos(self.clock.nanoseconds(ticks.cast_unsigned()));
            self.gate.sleep_until(Instant::now() + wait.min(Duration::from_secs(1)));
        }
    }
}

/// Locks a vCPU. A thread that panicked with the lock held has left the vCPU as it was.
pub(crate) fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Describes where the guest is, for messages.
fn place(vcpu: &VcpuFd) -> String {
    vcpu.get_regs().map_or(String::new(), |regs| format!(" at rip {:#x}", regs.rip))
}

extern "C" fn leave_guest<Info, Context>(_: std::ffi::c_int, _: *mut Info, _: *mut Context) {
    // Without a destructor, so that it can be reached at any time in the thread's life.
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: it points into the mapping of this thread's vCPU, which the thread keeps for as
        // long as it is set here; KVM expects it to be written at any time.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
