//! The command line of a guest that can be moved.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::backend::{self, CANONICAL, holds_data};
use crate::host::Host;
use crate::line::{Item, items};
use crate::settings::Settings;
use crate::size;
use crate::warning::Warning;
use memlane_qmp::options::{Written, escaped};

/// A command line that was changed.
#[derive(Clone, Debug)]
pub(crate) struct Rewritten {
    /// These are the arguments, without the program's name and without a monitor.
    pub arguments: Vec<OsString>,
    /// At these places of the arguments stands the path of a file with this text, which is not the one that was named.
    pub files: BTreeMap<usize, String>,
    /// The guest has this name.
    pub name: Option<String>,
    /// There is a monitor of Memlane already.
    pub has_monitor: bool,
    /// What is left as it was is told by these.
    pub warnings: Vec<Warning>,
}

/// Makes all RAM of a guest shared files.
pub(crate) fn rewrite(arguments: &[OsString], mut host: Host) -> Rewritten {
    let (items, mut warnings) = (items(arguments), Vec::new());
    let mut settings = Settings::gather(&items, &mut warnings);
    let mut lines = arguments.iter().cloned().map(Some).collect::<Vec<_>>();
    let mut files = BTreeMap::new();
    if settings.confidential {
        let what = "the RAM of a confidential guest is hidden from the host";
        warnings
            .push(Warning::new(what, "start it without confidential-guest-support and memory-encryption"));
    } else {
        share_objects(&items, &mut lines, &mut host, &mut warnings);
        for (at, mut file) in std::mem::take(&mut settings.files) {
            let mut changed = false;
            for section in file.sections.iter_mut().filter(|section| section.group == "object") {
                match backend::share(section, &mut host) {
                    Ok(this) => changed |= this,
                    Err(warning) => warnings.push(warning),
                }
            }
            if changed {
                files.insert(at, file.to_string());
            }
        }
        match main_memory(&settings, &mut host) {
            Ok(None) => {}
            Ok(Some(added)) => {
                for item in items.iter().filter(|item| item.name == "mem-path") {
                    lines[item.at..=item.at + usize::from(item.value.is_some())].fill(None);
                }
                lines.extend(added.map(|argument| Some(argument.into())));
            }
            Err(warning) => warnings.push(warning),
        }
    }
    let place = |at: usize| lines[..at].iter().flatten().count();
    let files = files.into_iter().map(|(at, text)| (place(at), text)).collect();
    let Settings { name, has_monitor, .. } = settings;
    Rewritten { arguments: lines.into_iter().flatten().collect(), files, name, has_monitor, warnings }
}

/// Shares the memory backends of the command line itself.
fn share_objects(
    items: &[Item<'_>],
    lines: &mut [Option<OsString>],
    host: &mut Host,
    warnings: &mut Vec<Warning>,
) {
    for item in items.iter().filter(|item| item.name == "object") {
        let Some(text) = item.text() else { continue };
        match share_object(text, host) {
            Ok(Some(changed)) => lines[item.at + 1] = Some(changed.into()),
            Ok(None) => {}
            Err(warning) => warnings.push(warning),
        }
    }
}

/// Returns the object as it is to be, if that is another than it is.
fn share_object(text: &str, host: &mut Host) -> Result<Option<String>, Warning> {
    let mut object = Written::parse(text, "qom-type")
        .map_err(|error| Warning::new(format!("cannot read -object {text} ({error})"), "correct it"))?;
    Ok(backend::share(&mut object, host)?.then(|| object.to_string()))
}

/// Returns the arguments that make the RAM of `-m` a shared file, if the guest has such RAM.
fn main_memory(settings: &Settings, host: &mut Host) -> Result<Option<[String; 4]>, Warning> {
    // What stands in a file that could not be read has been told of.
    if settings.has_backend || settings.unread_file {
        return Ok(None);
    }
    if settings.numa_memory {
        let what = "a NUMA node has RAM by mem=";
        return Err(Warning::new(what, "give it a memory backend by -numa node,memdev="));
    }
    let id = default_id(settings.machine.as_deref())?;
    let size = settings.memory.as_deref();
    let Some(bytes) = size::of_memory(size).filter(|_| !settings.odd_memory) else {
        let what = match size {
            Some(size) if !settings.odd_memory => format!("-m has {size}, which is no size"),
            _ => "the machine is told its RAM by memory.size=".to_owned(),
        };
        return Err(Warning::new(what, "say the size of the RAM by -m, such as -m 2G"));
    };
    let place = match &settings.path {
        Some(path) if holds_data(Path::new(path)) => {
            return Err(backend::private_data("the guest's RAM", path));
        }
        Some(path) if !backend::is_memory(Path::new(path)) => {
            return Err(backend::on_a_disk("the guest's RAM", path));
        }
        Some(path) => PathBuf::from(path),
        None => host.ordinary("the guest's RAM", bytes)?,
    };
    let place = escaped(&place.to_string_lossy());
    // -mem-prealloc itself stays where it is: it is said of all backends.
    let prealloc = if settings.prealloc { ",prealloc=on" } else { "" };
    let object = format!(
        "memory-backend-file,id={id},share=on,size={bytes}B,mem-path={place},{CANONICAL}=off{prealloc}"
    );
    // Options of this name add up.
    Ok(Some(["-object".into(), object, "-machine".into(), format!("memory-backend={id}")]))
}

/// Returns the name that QEMU gives the RAM of a machine by itself (`default_ram_id` of its `MachineClass`).
fn default_id(machine: Option<&str>) -> Result<&'static str, Warning> {
    match machine {
        None => Ok("pc.ram"),
        Some("microvm") => Ok("microvm.ram"),
        Some(name) if ["pc", "q35", "isapc", "xenfv"].iter().any(|known| name.starts_with(known)) => {
            Ok("pc.ram")
        }
        Some(name) => Err(Warning::new(
            format!("nobody knows how the machine {name} names its RAM"),
            "give it a memory backend by -machine memory-backend=",
        )),
    }
}
