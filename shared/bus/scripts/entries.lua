-- Prelude of every script that works on an entry of `encode` or `generate`: a consumer owns an entry only while it is
-- pending under the consumer's name.
-- KEYS: stream, ...
-- ARGV: consumer group, consumer, ...
local function owns(id)
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])
  return not pending.err and #pending == 1
end

local function ack(id)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('XDEL', KEYS[1], id)
end

local function quarantine(id, stream, length, reason, attempts)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    redis.call('XADD', stream, 'MAXLEN', '~', length, '*', 'reason', reason, 'attempts', attempts, unpack(entry[2]))
  end
end
