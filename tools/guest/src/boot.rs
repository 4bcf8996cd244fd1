//! The work of an init: before anything else, and at the very end.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketType};
use rustix::system::{RebootCommand, finit_module};

/// The directory of the kernel's modules in the initramfs. Their names are in the order in which they are loaded.
const MODULES: &str = "/modules";
const INTERFACE: &[u8] = b"eth0";
/// The number of looks for the interface, 50 ms apart.
const LOOKS: u32 = 200;

/// Mounts the file systems of the kernel.
pub(crate) fn mount() -> Result<(), String> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let failed = |error: io::Error| format!("mounting {kind} at {place}: {error}");
        fs::create_dir_all(place).map_err(failed)?;
        rustix::mount::mount(kind, place, kind, MountFlags::empty(), None)
            .map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// Loads all modules of the initramfs.
pub(crate) fn load_modules() -> Result<(), String> {
    // Without any the kernel has all it needs built in.
    let Ok(entries) = fs::read_dir(MODULES) else { return Ok(()) };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().try_for_each(|file| {
        load(file).map_err(|error| format!("loading the kernel's module {}: {error}", file.display()))
    })
}

fn load(file: &Path) -> io::Result<()> {
    match finit_module(File::open(file)?, c"", 0) {
        // It is there already, or built in.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Gives `eth0` its address and brings it up.
pub(crate) fn bring_up(address: Ipv4Addr, prefix: u8) -> Result<(), String> {
    let failed = |what: &str, error: io::Error| format!("{what} of eth0: {error}");
    let up = libc::__c_anonymous_ifr_ifru { ifru_flags: (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short };
    let mask = Ipv4Addr::from_bits(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0));

    wait_for_interface()?;
    set(libc::SIOCSIFADDR, internet(address)).map_err(|error| failed("setting the address", error))?;
    set(libc::SIOCSIFNETMASK, internet(mask)).map_err(|error| failed("setting the netmask", error))?;
    set(libc::SIOCSIFFLAGS, up).map_err(|error| failed("setting the flags", error))
}

/// Takes `eth0` down.
fn take_down() -> io::Result<()> {
    set(libc::SIOCSIFFLAGS, libc::__c_anonymous_ifr_ifru { ifru_flags: 0 })
}

/// Changes a setting of `eth0` (netdevice(7)).
fn set(request: libc::Ioctl, value: libc::__c_anonymous_ifr_ifru) -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut order = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: value };
    for (to, from) in order.ifr_name.iter_mut().zip(INTERFACE) {
        *to = *from as libc::c_char;
    }
    // SAFETY: these requests only read the structure, which netdevice(7) asks for.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw const order) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn wait_for_interface() -> Result<(), String> {
    for _ in 0..LOOKS {
        if Path::new("/sys/class/net/eth0").exists() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err("there is no eth0: give the guest a virtio-net-pci device".into())
}

fn internet(address: Ipv4Addr) -> libc::__c_anonymous_ifr_ifru {
    let mut ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: [0; 14] };
    // A sockaddr_in: port, then address.
    for (to, from) in ifru_addr.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::__c_anonymous_ifr_ifru { ifru_addr }
}

/// Returns an identity that is different for each boot of the guest.
pub(crate) fn boot_id() -> Result<String, String> {
    let file = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(file).map_err(|error| format!("reading {file}: {error}"))?;
    Ok(text.trim().to_owned())
}

/// Resets the machine.
pub(crate) fn reboot() -> ! {
    end(RebootCommand::Restart)
}

/// Switches the machine off.
pub(crate) fn power_off() -> ! {
    end(RebootCommand::PowerOff)
}

fn end(command: RebootCommand) -> ! {
    // As every distribution does. The kernel marks the device's queues as broken, and virtio-net, where a packet comes at
    // that moment, waits for ever in its poll for such a queue to take something (virtnet_poll_cleantx, Linux 6.1.192).
    if let Err(error) = take_down() {
        println!("memlane-init: cannot take eth0 down: {error}");
    }
    let Err(error) = rustix::system::reboot(command) else { unreachable!("the machine is gone") };
    println!("memlane-init: cannot end the machine: {error}");
    loop {
        std::thread::park();
    }
}
