#!/bin/bash
# Starts PostgreSQL as the official image does, with the environment that it documents:
# POSTGRES_PASSWORD, _USER, _DB, _INITDB_ARGS (each also as …_FILE), POSTGRES_HOST_AUTH_METHOD, PGDATA,
# and the files in /docker-entrypoint-initdb.d. As there, a first start that is killed half-way leaves something that the
# next one takes for a whole database; and under the name docker-ensure-initdb.sh it makes the database and ends.
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

make_database() {
  local method
  if [ -z "$POSTGRES_PASSWORD" ] && [ "$POSTGRES_HOST_AUTH_METHOD" != trust ]; then
    fail 'Database is uninitialized and superuser password is not specified: set POSTGRES_PASSWORD (or POSTGRES_HOST_AUTH_METHOD=trust)'
  fi
  # A name for whatever user id this runs as, which initdb asks for.
  if ! getent passwd "$(id -u)" >/dev/null; then
    echo >&2 "note: user id $(id -u) has no name in /etc/passwd; initdb will refuse it"
  fi
  eval "initdb --pgdata=\"\$PGDATA\" --username=\"\$POSTGRES_USER\" --pwfile=<(printf '%s\n' \"\$POSTGRES_PASSWORD\") $POSTGRES_INITDB_ARGS"
  method=$POSTGRES_HOST_AUTH_METHOD
  : "${method:=$(postgres -C password_encryption "$@")}"
  printf '\nhost all all all %s\n' "$method" >>"$PGDATA/pg_hba.conf"

  PGUSER=$POSTGRES_USER pg_ctl -w -o "$(printf '%q ' "$@") -c listen_addresses='' -p 5432" start
  if [ -z "$(query postgres -tA -v "name=$POSTGRES_DB" <<<"SELECT 1 FROM pg_database WHERE datname = :'name'")" ]; then
    query postgres -v "name=$POSTGRES_DB" <<<'CREATE DATABASE :"name"'
  fi
  init_files
  PGUSER=$POSTGRES_USER pg_ctl -m fast -w stop
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
    make_database "${@:2}"
    echo 'PostgreSQL init process complete; ready for start up.'
  fi
fi
case $0 in */docker-ensure-initdb.sh) exit ;; esac
exec "$@"
