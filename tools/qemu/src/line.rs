//! A command line of QEMU, split into its options.

use std::ffi::{OsStr, OsString};

/// These options of QEMU have no value, or had none in the versions that knew them. All others have one.
const WITHOUT_VALUE: [&str; 48] = [
    "S",
    "alt-grab",
    "audio-help",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-hax",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-frame",
    "no-hpet",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nodefconfig",
    "nographic",
    "old-param",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "s",
    "sdl",
    "semihosting",
    "show-cursor",
    "singlestep",
    "snapshot",
    "tdf",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "xen-create",
    "xen-domid-restrict",
];

/// An option of a command line, with its value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item<'a> {
    /// The option has this name, without dashes. An argument that is no option has an empty one.
    pub name: &'a str,
    /// The option is this argument, and its value is the next one.
    pub at: usize,
    /// The option has this value.
    pub value: Option<&'a OsStr>,
}

impl<'a> Item<'a> {
    /// Returns the value, unless it is no valid UTF-8.
    pub(crate) fn text(&self) -> Option<&'a str> {
        self.value.and_then(OsStr::to_str)
    }
}

/// Splits a command line, which does not contain the program's name, as QEMU does.
pub(crate) fn items(arguments: &[OsString]) -> Vec<Item<'_>> {
    let mut items = Vec::new();
    let mut rest = arguments.iter().enumerate();
    while let Some((at, argument)) = rest.next() {
        let option = argument.to_str().and_then(|text| text.strip_prefix('-'));
        let name = option.map(|name| name.strip_prefix('-').unwrap_or(name)).unwrap_or_default();
        let has_value = option.is_some() && !WITHOUT_VALUE.contains(&name);
        let value = if has_value { rest.next().map(|(_, value)| value.as_os_str()) } else { None };
        items.push(Item { name, at, value });
    }
    items
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn values_are_told_from_options() {
        let mut line: Vec<OsString> =
            "-S --object -m -daemonize disk.img -m 2G -append".split(' ').map(Into::into).collect();
        line.insert(0, OsString::from_vec(vec![b'-', 0xff]));
        let items: Vec<_> = items(&line).iter().map(|item| (item.name, item.at, item.text())).collect();
        let expected = [
            ("", 0, None),
            ("S", 1, None),
            ("object", 2, Some("-m")),
            ("daemonize", 4, None),
            ("", 5, None),
            ("m", 6, Some("2G")),
            ("append", 8, None),
        ];
        assert_eq!(items, expected);
    }
}
