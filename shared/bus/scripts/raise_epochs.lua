-- Raise the epochs (fencing tokens) of the requests whose entries the consumer owns: it becomes their owner.
-- KEYS: stream, record...
-- ARGV: consumer group, consumer, entry id...
-- Returns {epoch...}: 0 for a request without a record, -1 for an entry that the consumer does not own. In place of an
-- epoch that is no number comes the time, which no count of deliveries reaches.
-- requires: entries
-- requires: typed
-- requires: note_entry
local epochs = {}
for i = 3, #ARGV do
  local record = KEYS[i - 1]
  if not owns(ARGV[i]) then
    epochs[#epochs + 1] = -1
  elseif redis.call('EXISTS', record) == 0 then
    epochs[#epochs + 1] = 0
  else
    local epoch = redis.pcall('HINCRBY', record, 'epoch', 1)
    if type(epoch) ~= 'number' then
      epoch = tonumber(redis.call('TIME')[1])
      if is_a('hash', record) then redis.call('HSET', record, 'epoch', epoch) end
    end
    if is_a('hash', record) then note_entry(record, KEYS[1], ARGV[i]) end
    epochs[#epochs + 1] = epoch
  end
end
return epochs
