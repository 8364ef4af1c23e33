-- Read the figures of a work stream.
-- KEYS: stream
-- ARGV: consumer group, consumer that stands for what waits for its turn
-- Returns {length, oldest entry, pending, oldest entry that was never delivered, entries ever added}.
-- requires: consumer_group
local function first(from)
  local entry = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1)[1]
  return entry and entry[1] or ''
end
local found = consumer_group() or {pending = 0, ['last-delivered-id'] = '0-0'}
local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
local added = 0
for i = 1, #stream, 2 do
  if stream[i] == 'entries-added' then added = stream[i + 1] end
end
local waiting, turns = first('(' .. found['last-delivered-id']), 0
if found['name'] and found['pending'] > 0 then
  for _, consumer in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1])[4] or {}) do
    if consumer[1] == ARGV[2] then turns = tonumber(consumer[2]) end
  end
  if turns > 0 then waiting = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])[1][1] end
end
return {redis.call('XLEN', KEYS[1]), first('-'), found['pending'] - turns, waiting, added}
