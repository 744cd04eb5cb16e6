#!/bin/bash
# Starts PostgreSQL as the official image does, with the environment that it documents:
# POSTGRES_PASSWORD, _USER, _DB, _INITDB_ARGS (each also as …_FILE), POSTGRES_HOST_AUTH_METHOD, PGDATA,
# and the files in /docker-entrypoint-initdb.d. One thing is stricter: a first start that is
# killed half-way leaves nothing that the next start would take for a whole database.
set -euo pipefail

from_file() { # VARIABLE DEFAULT: the value, or what is in the file that VARIABLE_FILE names
  local file=${1}_FILE
  if [ -n "${!file-}" ]; then
    [ -z "${!1-}" ] || fail "both $1 and $file are set"
    printf -v "$1" %s "$(<"${!file}")"
  fi
  printf -v "$1" %s "${!1:-$2}"
  export "${1?}"
  unset "$file"
}

fail() {
  echo >&2 "Error: $*"
  exit 1
}

as_postgres() { # started as root: hand the folders over and go on as postgres
  mkdir -p "$PGDATA" /var/run/postgresql
  chmod 3775 /var/run/postgresql || :
  find "$PGDATA" /var/run/postgresql \! -user postgres -exec chown postgres '{}' +
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
}

# A new database is made in $PGDATA/.initdb.new, renamed to .initdb.done when it is whole, and
# its entries are then moved up, PG_VERSION, by which a database is known, as the last. Killed
# while making: it is made anew. Killed while moving: the moving goes on.
NEW=.initdb.new DONE=.initdb.done

move_up() {
  local entry
  for entry in "$PGDATA/$DONE"/* "$PGDATA/$DONE"/.[!.]*; do
    case $entry in */PG_VERSION | *'/*' | *'/.[!.]*') continue ;; esac
    mv "$entry" "$PGDATA/"
  done
  sync -f "$PGDATA"
  mv "$PGDATA/$DONE/PG_VERSION" "$PGDATA/"
}

make_database() {
  local found method
  if [ -z "$POSTGRES_PASSWORD" ] && [ "$POSTGRES_HOST_AUTH_METHOD" != trust ]; then
    fail 'Database is uninitialized and superuser password is not specified: set POSTGRES_PASSWORD (or POSTGRES_HOST_AUTH_METHOD=trust)'
  fi
  rm -rf "${PGDATA:?}/$NEW"
  found=$(find "$PGDATA" -mindepth 1 -maxdepth 1 -printf '%f ')
  [ -z "$found" ] || fail "$PGDATA holds something that is no database: $found"

  # A name for whatever user id this runs as, which initdb asks for.
  if ! getent passwd "$(id -u)" >/dev/null; then
    echo >&2 "note: user id $(id -u) has no name in /etc/passwd; initdb will refuse it"
  fi
  eval "initdb --pgdata=\"\$PGDATA/\$NEW\" --username=\"\$POSTGRES_USER\" --pwfile=<(printf '%s\n' \"\$POSTGRES_PASSWORD\") $POSTGRES_INITDB_ARGS"
  method=$POSTGRES_HOST_AUTH_METHOD
  : "${method:=$(postgres -C password_encryption -D "$PGDATA/$NEW" "$@")}"
  printf '\nhost all all all %s\n' "$method" >>"$PGDATA/$NEW/pg_hba.conf"

  PGUSER=$POSTGRES_USER pg_ctl -D "$PGDATA/$NEW" -w -o "$(printf '%q ' "$@") -c listen_addresses='' -p 5432" start
  if [ -z "$(query postgres -tA -v "name=$POSTGRES_DB" <<<"SELECT 1 FROM pg_database WHERE datname = :'name'")" ]; then
    query postgres -v "name=$POSTGRES_DB" <<<'CREATE DATABASE :"name"'
  fi
  init_files
  PGUSER=$POSTGRES_USER pg_ctl -D "$PGDATA/$NEW" -m fast -w stop
  sync -f "$PGDATA/$NEW"
  mv "$PGDATA/$NEW" "$PGDATA/$DONE"
}

query() { # DATABASE PSQL-OPTION…
  local database=$1
  shift
  PGHOST='' PGHOSTADDR='' PGPASSWORD=$POSTGRES_PASSWORD psql -v ON_ERROR_STOP=1 --no-psqlrc --no-password \
    -U "$POSTGRES_USER" -d "$database" "$@"
}

docker_process_sql() { query "$POSTGRES_DB" "$@"; } # the name that scripts written for the official image use

init_files() {
  local file
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh)
        echo "running $file"
        # shellcheck disable=SC1090
        if [ -x "$file" ]; then "$file"; else . "$file"; fi
        ;;
      *.sql) echo "running $file" && query "$POSTGRES_DB" -f "$file" ;;
      *.sql.gz) echo "running $file" && gunzip -c "$file" | query "$POSTGRES_DB" ;;
      */\*) ;;
      *) echo "ignoring $file" ;;
    esac
  done
}

case ${1-} in -*) set -- postgres "$@" ;; esac
if [ "${1-}" = postgres ]; then
  for word; do case $word in -'?' | --help | --describe-config | -V | --version) exec "$@" ;; esac; done
  export PGDATA=${PGDATA:-/var/lib/postgresql/data}
  if [ "$(id -u)" = 0 ]; then as_postgres "$@"; fi

  mkdir -p "$PGDATA"
  chmod 0700 "$PGDATA" || :
  if [ ! -s "$PGDATA/PG_VERSION" ]; then
    from_file POSTGRES_PASSWORD ''
    from_file POSTGRES_USER postgres
    from_file POSTGRES_DB "$POSTGRES_USER"
    from_file POSTGRES_INITDB_ARGS ''
    : "${POSTGRES_HOST_AUTH_METHOD:=}"
    if [ ! -e "$PGDATA/$DONE/PG_VERSION" ]; then make_database "${@:2}"; fi
    move_up
    echo 'PostgreSQL init process complete; ready for start up.'
  fi
  rmdir "$PGDATA/$DONE" 2>/dev/null || : # killed just before move_up's last step
fi
exec "$@"
