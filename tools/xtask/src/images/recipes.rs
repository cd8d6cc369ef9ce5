//! What the images are made of.

use sapwood_tests::corpus::IMAGES;

/// Raised when the same packages become something else.
const VERSION: u32 = 1;
/// Every image is of a machine that runs and is logged in to.
const COMMON: &[&str] = &[
    "ca-certificates",
    "curl",
    "initramfs-tools",
    "less",
    "locales",
    "man-db",
    "openssh-server",
    "systemd-sysv",
    "vim",
];

/// How one image is made.
#[derive(Clone)]
pub struct Recipe {
    /// Its name, one of [`IMAGES`].
    pub name: &'static str,
    /// The release of Debian.
    pub suite: &'static str,
    /// What it has beside [`COMMON`].
    packages: &'static [&'static str],
    /// Its file system's UUID.
    pub uuid: String,
}

impl Recipe {
    /// All packages that are asked for.
    pub fn packages(&self) -> Vec<&'static str> {
        COMMON.iter().chain(self.packages).copied().collect()
    }

    /// Describes the image, so that another description makes it anew.
    pub fn text(&self) -> String {
        format!("{VERSION} {} {}\n", self.suite, self.packages().join(" "))
    }
}

/// The images in the order in which they are imported.
pub fn all() -> Vec<Recipe> {
    let made_of = |name| -> (&str, &[&str]) {
        match name {
            "server" => ("bookworm", &["linux-image-amd64", "git", "rsync", "tmux"]),
            "web" => ("bookworm", WEB),
            "python" => ("bookworm", PYTHON),
            "database" => ("trixie", DATABASE),
            "build" => ("trixie", BUILD),
            "documents" => ("trixie", DOCUMENTS),
            _ => panic!("image {name} has no recipe"),
        }
    };
    let recipe = |(i, name)| {
        let (suite, packages) = made_of(name);
        Recipe { name, suite, packages, uuid: format!("5a9700d0-0000-4000-8000-00000000c0{i:02}") }
    };
    IMAGES.into_iter().enumerate().map(recipe).collect()
}

const WEB: &[&str] = &[
    "linux-image-amd64",
    "certbot",
    "git",
    "imagemagick",
    "nginx",
    "nodejs",
    "php-fpm",
    "php-gd",
    "php-mysql",
    "redis-server",
];

const PYTHON: &[&str] = &[
    "linux-image-cloud-amd64",
    "ipython3",
    "jupyter-notebook",
    "python3-django",
    "python3-pandas",
    "python3-pip",
    "python3-pytest",
    "python3-sphinx",
    "python3-sqlalchemy",
    "python3-venv",
];

const DATABASE: &[&str] = &[
    "linux-image-amd64",
    "mariadb-server",
    "postgresql",
    "postgresql-plpython3-17",
    "python3-psycopg2",
    "redis-server",
    "slapd",
    "sqlite3",
];

const BUILD: &[&str] = &[
    "linux-image-amd64",
    "build-essential",
    "cmake",
    "gdb",
    "git",
    "libssl-dev",
    "ninja-build",
    "pkgconf",
    "valgrind",
];

const DOCUMENTS: &[&str] = &[
    "linux-image-cloud-amd64",
    "debian-policy",
    "groff",
    "info",
    "libdbi-perl",
    "libmoose-perl",
    "libwww-perl",
    "manpages-dev",
    "pandoc",
    "perl-doc",
    "texlive-latex-recommended",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_has_a_recipe_of_its_own() {
        let all = all();
        assert_eq!(all.len(), IMAGES.len());
        for (i, recipe) in all.iter().enumerate() {
            assert_eq!(recipe.name, IMAGES[i]);
            assert_eq!(recipe.uuid.len(), 36);
            let twin =
                all[..i].iter().find(|before| before.uuid == recipe.uuid || before.text() == recipe.text());
            assert!(twin.is_none(), "{}", recipe.name);
        }
    }
}
