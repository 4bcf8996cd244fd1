//! The smallest VMM whose guest Memlane can move: one vCPU under KVM, 16 MiB of RAM, and no devices.
//!
//! It is started on the host where the guest begins to run, and with `--incoming` on the host that the guest is to
//! move to:
//!
//!     smallest_vmm web1 /run/memlane/attach.sock
//!     smallest_vmm web1 /run/memlane/attach.sock --incoming

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{CpuId, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memlane_kvm::attach::{self, Ended, Vmm, VmmError};
use memlane_kvm::compat::{Program, describe_guest, describe_host, host_cpuid};
use memlane_kvm::dirty::{DirtyTracker, LogTracker};
use memlane_kvm::ram::{Backing, GuestRam};
use memlane_kvm::state::{self, MachineState, Moment, VmState};
use memlane_kvm::vcpu::{Capabilities, VcpuState, complete_io};
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use memlane_protocol::wire::machine::{GuestShape, Machine};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Bytes of RAM, all at guest physical address 0.
const RAM: u64 = 16 << 20;
/// Where the guest's program lies.
const CODE_ADDRESS: GuestAddress = GuestAddress(0x1000);
/// Where the guest counts the laps that it has made through its memory.
const LAPS_ADDRESS: GuestAddress = GuestAddress(0x2000);

/// The guest's program (32-bit mode, no paging). It adds 1 to the first word of each page from 1 MiB on, lap by lap.
/// Before that it checks that the page holds what the last lap wrote, and halts if not: a page that was lost, or that
/// came in an old state, does not go unnoticed.
#[rustfmt::skip]
const CODE: [u8; 35] = [
    0xbf, 0x00, 0x00, 0x10, 0x00,       // lap:  mov edi, 0x100000
    0x39, 0x1f,                         // page: cmp [edi], ebx
    0x75, 0x19,                         //       jne wrong
    0xff, 0x07,                         //       inc dword [edi]
    0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, //       add edi, 0x1000
    0x81, 0xff, 0x00, 0x00, 0x00, 0x01, //       cmp edi, 0x1000000
    0x72, 0xec,                         //       jb page
    0x43,                               //       inc ebx
    0x89, 0x1d, 0x00, 0x20, 0x00, 0x00, //       mov [0x2000], ebx
    0xeb, 0xde,                         //       jmp lap
    0xf4,                               // wrong: hlt
];

/// A vCPU, and what its thread and the rest of the VMM both need.
struct Vcpu {
    /// The thread holds the lock while the guest may run.
    fd: Mutex<VcpuFd>,
    /// Whether the guest is to run.
    runs: AtomicBool,
    /// The thread lasts as long as the process; the guest's memory must last as long as the thread.
    _ram: Arc<GuestRam>,
}

impl Vcpu {
    /// Runs the guest whenever it is to run. This is the vCPU's thread.
    fn run(&self) -> ! {
        loop {
            while !self.runs.load(Ordering::Acquire) {
                thread::park();
            }
            let mut fd = self.fd.lock().unwrap();
            while self.runs.load(Ordering::Acquire) {
                match fd.run() {
                    Ok(VcpuExit::Intr) => {}
                    Err(error) if error.errno() == libc::EINTR => {}
                    Ok(VcpuExit::Hlt) => give_up("the guest has found memory that it did not write"),
                    exit => give_up(&format!("the guest has left KVM unexpectedly: {exit:?}")),
                }
            }
            // What a device has answered must be in the registers before they are saved.
            complete_io(&mut fd).unwrap_or_else(|error| give_up(&error.to_string()));
        }
    }
}

fn give_up(reason: &str) -> ! {
    eprintln!("{reason}");
    std::process::exit(1)
}

/// The VMM, as Memlane sees it.
struct SmallestVmm {
    name: Label,
    program: Program,
    machine: Machine,
    host: Capabilities,
    ram: Arc<GuestRam>,
    tracker: LogTracker,
    vm: Arc<VmFd>,
    vcpu: Arc<Vcpu>,
    thread: JoinHandle<()>,
}

impl SmallestVmm {
    /// Makes a guest that does not run yet. One that is `incoming` gets its memory and its state from another host.
    fn new(name: Label, incoming: bool) -> Result<Self, VmmError> {
        let program = Program { name: "smallest-vmm".parse()?, state_version: state::VERSION, vcpus: 1 };
        let ram = Arc::new(GuestRam::create(&[(0, RAM)], &Backing::Memfd)?);
        let kvm = Kvm::new()?;
        let vm = Arc::new(kvm.create_vm()?);
        // SAFETY: the only vCPU holds the RAM, so the RAM outlives whatever runs in this VM.
        let slots = unsafe { ram.register(&vm, 0) }?;
        let fd = vm.create_vcpu(0)?;
        fd.set_cpuid2(&CpuId::from_entries(&host_cpuid(&kvm, &[])?)?)?;
        // After the CPUID, before anything runs.
        let host = Capabilities::probe(&kvm, &vm, &fd, false)?;
        let machine = match incoming {
            true => describe_host(&kvm, &program, &[])?,
            false => {
                ram.memory().write_slice(&CODE, CODE_ADDRESS)?;
                start_at_code(&fd)?;
                describe_guest(&program, &host, false, &fd)?
            }
        };
        let tracker = LogTracker::new(Arc::clone(&vm), Arc::clone(&ram), slots)?;
        let (fd, runs, _ram) = (Mutex::new(fd), AtomicBool::new(false), Arc::clone(&ram));
        let vcpu = Arc::new(Vcpu { fd, runs, _ram });
        let thread = thread::spawn({
            let vcpu = Arc::clone(&vcpu);
            move || vcpu.run()
        });
        Ok(Self { name, program, machine, host, ram, tracker, vm, vcpu, thread })
    }
}

impl Vmm for SmallestVmm {
    fn shape(&self) -> GuestShape {
        GuestShape {
            name: self.name.clone(),
            tracker: self.tracker.kind(),
            machine: self.machine.clone(),
            regions: self.ram.regions().to_vec(),
            nics: Vec::new(),
        }
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.tracker
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.vcpu.runs.store(false, Ordering::Release);
        // A signal makes KVM_RUN return. One that comes just before KVM_RUN is lost, so it is sent until it works.
        while self.vcpu.fd.try_lock().is_err() {
            self.thread.kill(SIGRTMIN())?;
            thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.vcpu.runs.store(true, Ordering::Release);
        self.thread.thread().unpark();
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        let now = Moment::now();
        let vcpu = VcpuState::capture(&self.vcpu.fd.lock().unwrap(), &self.host, &now)?;
        let vm = VmState::capture(&self.vm, self.host.irqchip, false)?;
        // The states of a VMM's own devices would go into `own`.
        let state = MachineState { captured_at: now.realtime, vm, vcpus: vec![vcpu], own: Vec::new() };
        Ok(state.encode())
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        let state = MachineState::decode(state, self.program.vcpus)?;
        let now = Moment::now();
        let passed = state.passed(&now);
        let vcpu = self.vcpu.fd.lock().unwrap();
        state.vm.restore(&self.vm, passed)?;
        state.vcpus[0].restore(&vcpu, &self.host, &now, passed)?;
        // From here on this is the guest's machine, and no longer what the host could run.
        self.machine = describe_guest(&self.program, &self.host, false, &vcpu)?;
        Ok(())
    }

    fn discard(&mut self) {
        if let Err(error) = self.pause() {
            give_up(&format!("the guest runs elsewhere and could not be stopped here: {error}"));
        }
    }
}

/// Puts a vCPU into 32-bit mode without paging, at the beginning of the program.
fn start_at_code(fd: &VcpuFd) -> Result<(), VmmError> {
    let mut sregs = fd.get_sregs()?;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, ..flat };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    fd.set_sregs(&sregs)?;
    let mut regs = fd.get_regs()?;
    (regs.rip, regs.rflags, regs.rbx) = (CODE_ADDRESS.0, 2, 0);
    Ok(fd.set_regs(&regs)?)
}

extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Its arrival is all that matters: it interrupts KVM_RUN.
}

fn main() -> Result<(), VmmError> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (name, socket, incoming) = match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [name, socket] => (name.parse::<Label>()?, socket.into(), false),
        [name, socket, "--incoming"] => (name.parse::<Label>()?, socket.into(), true),
        _ => return Err("usage: smallest_vmm NAME ATTACH-SOCKET [--incoming]".into()),
    };
    register_signal_handler(SIGRTMIN(), leave_guest)?;
    let mut vmm = SmallestVmm::new(name, incoming)?;
    if !incoming {
        vmm.resume()?;
    }
    let (ram, vcpu) = (Arc::clone(&vmm.ram), Arc::clone(&vmm.vcpu));
    let run_state = if incoming { RunState::Incoming } else { RunState::Running };
    let options = attach::Options { socket, run_state, refusal_is_final: false };
    let attachment = attach::serve(options, Arc::new(Mutex::new(vmm)))?;
    while !attachment.is_finished() {
        if vcpu.runs.load(Ordering::Acquire) {
            println!("laps: {}", ram.memory().read_obj::<u32>(LAPS_ADDRESS)?);
        }
        thread::sleep(Duration::from_millis(200));
    }
    match attachment.wait() {
        Ended::Discarded => println!("the guest runs elsewhere"),
        ended => println!("not attached any more: {ended:?}"),
    }
    Ok(())
}
