//! What a command line and the files that it names say about a guest, in the order in which QEMU reads them.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config_file::ConfigFile;
use crate::line::Item;
use crate::monitor;
use crate::warning::Warning;
use memlane_qmp::options::{Options, Properties};

/// What is said about the RAM and the name of a guest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// The machine has this type.
    pub machine: Option<String>,
    /// The machine or a NUMA node names a memory backend, so that there is no other RAM but that of backends.
    pub has_backend: bool,
    /// The guest has this much RAM, as `-m` says it.
    pub memory: Option<String>,
    /// The machine is told its RAM in a way that is not understood.
    pub odd_memory: bool,
    /// A NUMA node has RAM by `mem=`.
    pub numa_memory: bool,
    /// RAM lies in this file or directory (`-mem-path`).
    pub path: Option<String>,
    /// RAM is taken from the host before the guest starts (`-mem-prealloc`).
    pub prealloc: bool,
    /// The RAM is hidden from the host.
    pub confidential: bool,
    /// The guest has this name.
    pub name: Option<String>,
    /// There is a monitor of Memlane already.
    pub has_monitor: bool,
    /// These files of `-readconfig` are named at these places of the command line.
    pub files: BTreeMap<usize, ConfigFile>,
    /// A file of `-readconfig` cannot be read.
    pub unread_file: bool,
}

impl Settings {
    /// Gathers what is said, and warns of files that cannot be read.
    pub(crate) fn gather(items: &[Item<'_>], warnings: &mut Vec<Warning>) -> Self {
        let mut settings = Self::default();
        for item in items {
            settings.take(item, warnings);
        }
        settings
    }

    fn take(&mut self, item: &Item<'_>, warnings: &mut Vec<Warning>) {
        let options = |first| item.text().map(|text| Options::parse(text, first));
        let group = match item.name {
            "mem-path" => return self.path = item.text().map(str::to_owned),
            "mem-prealloc" => return self.prealloc = true,
            "readconfig" => return self.take_file(item, warnings),
            "M" => "machine",
            "m" => "memory",
            name => name,
        };
        let first = match group {
            "machine" | "numa" => "type",
            "memory" => "size",
            "name" => "guest",
            "chardev" => "backend",
            _ => return,
        };
        if let Some(options) = options(first) {
            self.take_group(group, &options);
        }
    }

    fn take_file(&mut self, item: &Item<'_>, warnings: &mut Vec<Warning>) {
        let Some(path) = item.value.map(Path::new) else { return };
        match ConfigFile::read(path) {
            Ok(file) => {
                for section in &file.sections {
                    self.take_group(&section.group, section);
                }
                self.files.insert(item.at + 1, file);
            }
            Err(error) => {
                self.unread_file = true;
                let what = format!("cannot read the file {} of -readconfig ({error})", path.display());
                warnings.push(Warning::new(what, "name a regular file of text there"));
            }
        }
    }

    fn take_group(&mut self, group: &str, options: &dyn Properties) {
        let replace = |to: &mut Option<String>, key| {
            if let Some(value) = options.get(key) {
                *to = Some(value);
            }
        };
        match group {
            "machine" => {
                replace(&mut self.machine, "type");
                self.has_backend |= options.get("memory-backend").is_some();
                self.odd_memory |= ["memory", "memory.size"].iter().any(|key| options.get(key).is_some());
                let keys = ["confidential-guest-support", "memory-encryption"];
                self.confidential |= keys.iter().any(|key| options.get(key).is_some());
            }
            "memory" => replace(&mut self.memory, "size"),
            "numa" => {
                self.has_backend |= options.get("memdev").is_some();
                self.numa_memory |= options.get("mem").is_some();
            }
            "name" => replace(&mut self.name, "guest"),
            "chardev" => self.has_monitor |= options.get("id").is_some_and(|id| id == monitor::ID),
            _ => {}
        }
    }
}
