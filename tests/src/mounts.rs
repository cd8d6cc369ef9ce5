//! Loop devices and file systems of a test's own. They need root; all of them are gone when the value
//! that stands for them is dropped, also by a panic.
//!
//! Nothing here fails where a machine lacks something: the error says what, and the test that cannot
//! be run says so with [`skip`].

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Says that a test was not run, and why, where the output of tests is not kept back.
pub fn skip(test: &str, reason: &str) {
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {reason}");
}

/// Runs a program to its end; what it said when it failed.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {}: {}", arguments.join(" "), said.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("our own paths are text")
}

/// A loop device over a sparse file of its own.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    folder: TempDir,
}

impl LoopDevice {
    /// A device of `bytes` bytes.
    ///
    /// # Errors
    /// Where none can be made, for example without root; the text says why.
    pub fn new(bytes: u64) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let file = File::create_new(folder.path().join("file")).map_err(|e| e.to_string())?;
        file.set_len(bytes).map_err(|e| e.to_string())?;
        Self::over(folder)
    }

    fn over(folder: TempDir) -> Result<Self, String> {
        let path = run("losetup", &["--find", "--show", text(&folder.path().join("file"))])?;
        Ok(Self { path: path.into(), folder })
    }

    /// Another device that holds what this one holds now, so what a power cut would leave of it at the
    /// least: all that was synced.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn copy(&self) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        run("cp", &["--sparse=always", text(&self.file()), text(&folder.path().join("file"))])?;
        Self::over(folder)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds its bytes.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("file")
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = run("losetup", &["--detach", text(&self.path)]) {
            skip("clean-up", &error);
        }
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mounted {
    folder: TempDir,
    /// Below it, and so gone after it.
    device: Option<LoopDevice>,
    lower: Option<Box<Mounted>>,
}

impl Mounted {
    fn at(folder: TempDir, kind: &str, source: &str, options: &str) -> Result<Self, String> {
        run("mount", &["-t", kind, "-o", options, source, text(folder.path())])?;
        Ok(Self { folder, device: None, lower: None })
    }

    fn new(kind: &str, source: &str, options: &str) -> Result<Self, String> {
        Self::at(tempfile::tempdir().map_err(|e| e.to_string())?, kind, source, options)
    }

    /// A file system on a loop device, made by `mkfs` and its arguments.
    ///
    /// # Errors
    /// Where there is no such program, or the kernel does not know the file system.
    pub fn on_loop(kind: &str, bytes: u64, mkfs: &[&str], options: &str) -> Result<Self, String> {
        let device = LoopDevice::new(bytes)?;
        run(mkfs[0], &[&mkfs[1..], &[text(device.path())]].concat())?;
        let mut mounted = Self::new(kind, text(device.path()), options)?;
        mounted.device = Some(device);
        Ok(mounted)
    }

    /// A file system in memory of this many bytes.
    ///
    /// # Errors
    /// As [`on_loop`](Self::on_loop).
    pub fn tmpfs(bytes: u64) -> Result<Self, String> {
        Self::new("tmpfs", "none", &format!("size={bytes}"))
    }

    /// An overlay whose files lie in another file system.
    ///
    /// # Errors
    /// As [`on_loop`](Self::on_loop).
    pub fn overlay(upper: Self) -> Result<Self, String> {
        let at = |name: &str| {
            let path = upper.path().join(name);
            // They are there already in a copy.
            fs::create_dir_all(&path).map_err(|e| e.to_string()).map(|()| path)
        };
        let (below, above, work) = (at("lower")?, at("upper")?, at("work")?);
        let options = format!("lowerdir={},upperdir={},workdir={}", text(&below), text(&above), text(&work));
        let mut mounted = Self::new("overlay", "overlay", &options)?;
        mounted.lower = Some(Box::new(upper));
        Ok(mounted)
    }

    /// The file system as a power cut now could leave it; `None` where it is in memory.
    ///
    /// # Errors
    /// As [`on_loop`](Self::on_loop).
    pub fn after_power_cut(&self, kind: &str) -> Result<Option<Self>, String> {
        if let Some(lower) = &self.lower {
            let lower = lower.after_power_cut(kind)?;
            return lower.map(Self::overlay).transpose();
        }
        let Some(device) = &self.device else { return Ok(None) };
        let device = device.copy()?;
        let mut mounted = Self::new(kind, text(device.path()), "rw")?;
        mounted.device = Some(device);
        Ok(Some(mounted))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let path = text(self.folder.path());
        // Lazily where a panic has left files open: it is gone when they are.
        if run("umount", &[path]).is_err()
            && let Err(error) = run("umount", &["--lazy", path])
        {
            skip("clean-up", &error);
        }
    }
}
