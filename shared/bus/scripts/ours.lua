-- Prelude of every script that works on an entry of `encode` or `generate`: an entry is a consumer's only while it is
-- pending under the consumer's name.
-- KEYS: stream, ...
-- ARGV: consumer group, consumer, ...
local function ours(id)
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])
  return not pending.err and #pending == 1
end

local function let_go(id)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('XDEL', KEYS[1], id)
end

local function keep(id, quarantine, length, reason, attempts)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    redis.call('XADD', quarantine, 'MAXLEN', '~', length, '*', 'reason', reason, 'attempts', attempts, unpack(entry[2]))
  end
end
