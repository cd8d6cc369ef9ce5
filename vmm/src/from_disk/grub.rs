//! `grub.cfg`, as `grub-mkconfig` writes it: the default entry, then the others. What an EFI system partition has in
//! `/EFI/debian/grub.cfg` only leads to the same file, which is found where it lies.

use super::script::{self, Boot, DevicePath, Item, Machine, Variables};
use super::{Candidate, ENTRIES_MAX, Place, System};

const FOLDERS: [&str; 4] = ["/boot/grub", "/grub", "/boot/grub2", "/grub2"];
const CONFIG: &str = "grub.cfg";
const ENVIRONMENT: &str = "grubenv";
/// For one boot only: GRUB unsets it when it boots, which cannot be done here, so that it is left alone.
const ONE_BOOT: &str = "next_entry";

/// The entries of every `grub.cfg`, the default of each first.
pub fn candidates(system: &mut System) -> Vec<Candidate> {
    let mut all = Vec::new();
    for volume in 0..system.volumes.len() {
        for folder in FOLDERS {
            if all.len() >= ENTRIES_MAX {
                break;
            }
            let path = format!("{folder}/{CONFIG}");
            let Some(text) = system.text(volume, &path) else { continue };
            let environment =
                system.text(volume, &format!("{folder}/{ENVIRONMENT}")).map(|text| block(&text));
            match read(system, volume, &path, &text, environment.as_ref()) {
                Ok(found) if found.is_empty() => {
                    let what = format!("{}: {path}: no entry that boots Linux", system.volumes[volume]);
                    system.try_in_vain(what);
                }
                Ok(found) => all.extend(found),
                Err(reason) => {
                    let what = format!("{}: {path}: {reason}", system.volumes[volume]);
                    system.try_in_vain(what);
                }
            }
        }
    }
    all.truncate(ENTRIES_MAX);
    all
}

/// GRUB's variables on a volume.
pub fn environment(system: &mut System, volume: usize) -> Variables {
    let found = FOLDERS.iter().find_map(|folder| system.text(volume, &format!("{folder}/{ENVIRONMENT}")));
    found.map(|text| block(&text)).unwrap_or_default()
}

/// An environment block (GRUB manual, section The GRUB environment block).
fn block(text: &str) -> Variables {
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    let known = lines.filter(|(name, _)| *name != ONE_BOOT).take(ENTRIES_MAX);
    known.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

fn read(
    system: &System,
    volume: usize,
    path: &str,
    text: &str,
    environment: Option<&Variables>,
) -> Result<Vec<Candidate>, &'static str> {
    let uuids: Vec<String> = system.volumes.iter().map(|volume| volume.uuid.to_ascii_lowercase()).collect();
    let statements = script::parse(text)?;
    let own = format!("UUID={}", uuids[volume]);
    let mut machine = Machine::new(own, environment, &uuids);
    let mut menu = Vec::new();
    machine.run(&statements, &mut menu);
    let default = machine.variables.get("default").cloned().unwrap_or_default();
    let mut flat = Vec::new();
    flatten(&menu, "", &mut flat);
    if let Some(chosen) = choose(&menu, &default) {
        // The sort is stable: the others stay in their order.
        flat.sort_by_key(|(item, _)| !std::ptr::eq(*item, chosen));
    }
    let mut found = Vec::new();
    for (item, within) in flat {
        let boot = machine.boot(item);
        let Some(((device, kernel), cmdline)) = boot.linux.clone() else { continue };
        let Some(kernel) = place(system, &(device, kernel)) else { continue };
        let Boot { initrds, .. } = boot;
        let Some(initrds) = initrds.iter().map(|initrd| place(system, initrd)).collect() else { continue };
        let mut names: Vec<String> = item.id.iter().cloned().collect();
        if !within.is_empty() {
            names.push(format!("{within}>{}", item.title));
        }
        let source = format!("{}: {path}, entry {:?} of GRUB", system.volumes[volume], item.title);
        found.push(Candidate { title: item.title.clone(), names, source, kernel, initrds, cmdline });
    }
    if machine.is_over { Err("its variables grow without bound") } else { Ok(found) }
}

/// All entries with the submenus that they lie in.
fn flatten<'i, 's>(menu: &'i [Item<'s>], within: &str, flat: &mut Vec<(&'i Item<'s>, String)>) {
    for item in menu {
        if item.is_submenu {
            let deeper =
                if within.is_empty() { item.title.clone() } else { format!("{within}>{}", item.title) };
            flatten(&item.items, &deeper, flat);
        } else {
            flat.push((item, within.to_owned()));
        }
    }
}

/// The entry that `default` names: a number, a title or an id, one for each menu on the way (`1>2`). A submenu stands for its
/// first entry.
fn choose<'i, 's>(menu: &'i [Item<'s>], default: &str) -> Option<&'i Item<'s>> {
    let mut menu = menu;
    // A title may have the character in it that separates menus.
    if let Some(item) = menu.iter().find(|item| item.title == default && !item.is_submenu) {
        return Some(item);
    }
    let mut chosen = None;
    for name in default.split('>').map(str::trim) {
        let by_name = menu.iter().find(|item| item.title == name || item.id.as_deref() == Some(name));
        let by_number = || name.parse::<usize>().ok().and_then(|number| menu.get(number));
        let item = by_name.or_else(by_number)?;
        chosen = Some(item);
        menu = &item.items;
    }
    let mut chosen = chosen?;
    while chosen.is_submenu {
        chosen = chosen.items.first()?;
    }
    Some(chosen)
}

/// Where a path of GRUB lies, if it is on this disk: `UUID=...` comes from `search`, `hd0,gpt1` or `hd0,msdos1` from `set root`.
fn place(system: &System, (device, path): &DevicePath) -> Option<Place> {
    let volume = match device.strip_prefix("UUID=") {
        Some(uuid) => system.by_uuid(uuid)?,
        None => {
            let partition = device.strip_prefix("hd0")?.trim_start_matches(',');
            let digits = partition.trim_start_matches(|c: char| c.is_ascii_alphabetic());
            system.by_number(if digits.is_empty() { 0 } else { digits.parse().ok()? })?
        }
    };
    Some(Place { volume, path: format!("/{}", path.trim_start_matches('/')) })
}
